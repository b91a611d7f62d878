"""What the supervisor makes of a worker group's results, losses and signs of life, over a real run directory."""

import pytest

from pipelines.config.sections import DurabilityConfig
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.workers.assignment import Assignment
from pipelines.workers.failures import GroupLost, WorkersFailed, WorkersSilent
from pipelines.workers.supervision import Supervisor


class ScriptedGroup:
    """The driver's end of a worker group whose workers do what the test says at each look."""

    def __init__(self, *looks):
        self.looks, self.submitted, self.killed = list(looks), 0, 0

    def submit(self, assignment):
        self.submitted += 1
        return self.submitted - 1

    def wait(self, number, seconds):
        look = self.looks.pop(0)
        return look() if callable(look) else look

    def kill(self):
        self.killed += 1


def lost():
    raise GroupLost("the node is gone")


@pytest.fixture
def run(tmp_path):
    return RunDirectory(str(tmp_path / "run"))


@pytest.fixture
def assignment(run):
    return Assignment(run.uri, {}, (), "steps/0-base", "base", {}, {})


def supervisor(group, run, progress=lambda: None, **durability):
    return Supervisor(group, run, DurabilityConfig(**durability), progress)


def test_an_error_of_an_earlier_start_does_not_kill_new_workers(run, assignment):
    run.event("worker_error", error="OSError: the storage is full")
    group = ScriptedGroup(None, {"stopped": False})
    watched = supervisor(group, run)
    watched.submit(assignment)
    assert watched.look(0) is None
    assert watched.look(0) == {"stopped": False}
    assert group.killed == 0


def test_an_error_written_before_the_work_is_handed_out_again_does_not_kill_new_workers(run, assignment):
    group = ScriptedGroup(None, {"stopped": False})
    watched = supervisor(group, run)
    run.event("worker_error", error="OSError: the storage is full")  # of a driver that died between
    watched.submit(assignment)
    assert watched.look(0) is None
    assert watched.look(0) == {"stopped": False}


def test_an_error_of_these_workers_ends_them_and_is_told(run, assignment):
    group = ScriptedGroup(lambda: run.event("worker_error", error="out of GPU memory"))
    watched = supervisor(group, run)
    watched.submit(assignment)
    with pytest.raises(WorkersFailed, match="out of GPU memory"):
        watched.look(0)
    assert group.killed == 1
    assert watched.is_idle


def test_an_error_that_also_ended_the_group_is_told_instead_of_starting_again(run, assignment):
    def broken():
        run.event("worker_error", error="DivergedError: the loss is not finite")
        lost()

    watched = supervisor(ScriptedGroup(broken), run)
    watched.submit(assignment)
    with pytest.raises(WorkersFailed, match="not finite"):
        watched.look(0)


def test_silent_workers_are_given_up(run, assignment):
    group = ScriptedGroup(None, None)
    watched = supervisor(group, run, start_timeout=1e-6)
    watched.submit(assignment)
    with pytest.raises(WorkersSilent, match="start_timeout"):
        watched.look(0)
    assert group.killed == 1


def test_progress_records_are_signs_of_life(run, assignment):
    seen = []
    watched = Supervisor(ScriptedGroup(None, None), run, DurabilityConfig(start_timeout=600), on_event=seen.append)
    watched.submit(assignment)
    record = Event("training", worker="a", serial=1)
    run.write_json("progress.json", record)
    before = watched._alive
    watched.look(0)
    assert watched._alive > before
    watched.look(0)
    assert seen == [record]  # the same record is no second sign


def test_lost_workers_may_start_again_as_long_as_they_make_progress(run, assignment):
    done = []
    group = ScriptedGroup(lambda: (done.append(1), lost()), lost, lost, lost)
    watched = supervisor(group, run, progress=lambda: len(done), max_failures=2)
    for _ in range(3):  # progress, then two starts without any
        watched.submit(assignment)
        with pytest.raises(GroupLost):
            watched.look(0)
    watched.submit(assignment)
    with pytest.raises(WorkersFailed, match="gave up after 3 starts without progress"):
        watched.look(0)


def test_a_result_takes_the_count_of_losses_back(run, assignment):
    group = ScriptedGroup(lost, {"stopped": False})
    watched = supervisor(group, run, max_failures=5)
    watched.submit(assignment)
    with pytest.raises(GroupLost):
        watched.look(0)
    assert watched.failures == 1
    watched.submit(assignment)
    watched.look(0)
    assert watched.failures == 0
