"""One trial whose workers fail, as told; what real ones do is in tests/integration/test_trial.py."""

import time
from dataclasses import replace

import pytest

from pipelines.config.loading import parse_config
from pipelines.runs.step_record import Cell, Seconds
from pipelines.search import trial as trials
from pipelines.search.trial import Trial
from pipelines.search.trial_spec import Spec
from pipelines.workers.assignment import Assignment, RungScores, rung_file
from pipelines.workers.failures import GroupLost
from tests.conftest import minimal
from tests.unit.sample_records import cell, step_record, training

VALUES = {"training.learning_rate": 1e-2}
RUNGS = (1 / 9, 1 / 3)


@pytest.fixture
def spec(tmp_path) -> Spec:
    config = parse_config(minimal(tmp_path, tmp_path, tracking=None))
    return Spec(
        config=config,
        uri=str(tmp_path / "search"),
        position=1,
        tasks=("reviews",),
        parent="b" * 32,
        parent_files=None,
        base_fingerprint="b" * 32,
        base_directory="steps/0-base-bbbbbbbb",
        identities=[{"name": "reviews"}],
        names=("reviews", "text"),
        cell_keys={"reviews": "k1", "text": "k2"},
        weight=1.0,
        reference={"text": 4.0},
        rungs=RUNGS,
        reduction=3,
    )


def cells(score: float, nll: float = 4.1) -> tuple[Cell, ...]:
    return cell("reviews", value=score), cell("text", "nll", nll)


class Workers:
    """The workers' side of the run directory, one action a look: faults that real workers have too seldom."""

    def __init__(self, trial_run, directory: str, actions: list):
        self.run, self.directory, self.actions = trial_run, directory, actions
        self.assignments: list[dict] = []
        self.killed = 0

    def submit(self, assignment: Assignment) -> int:
        self.assignments.append(assignment.to_json())
        return len(self.assignments) - 1

    def wait(self, number: int, seconds: float) -> dict | None:
        return self.actions.pop(0)(self) if self.actions else None

    def kill(self) -> None:
        self.killed += 1

    # -- actions

    def reach(rung: float, score: float, **fields):
        def act(self):
            found = RungScores(rung, cells(score), 1.0, round(90 * rung), 90, **fields)
            self.run.write_json(rung_file(rung), found)

        return act

    def end(score: float):
        def act(self):
            seconds = Seconds(train=5.0, evaluate=2.0, total=8.0)
            metrics = step_record(tasks=("reviews",), cells=cells(score), seconds=seconds, training=training(90))
            self.run.write_json(f"{self.directory}/metrics.json", metrics)
            return {"stopped": False}

        return act

    def lose(checkpoint: str | None = None):
        def act(self):
            if checkpoint:
                self.run.write_json(f"train/{self.directory[-8:]}/{checkpoint}", {})
            raise GroupLost("node gone")

        return act

    def report_error(self):
        self.run.event("worker_error", error="out of GPU memory")


def make(spec: Spec, *actions) -> tuple[Trial, Workers]:
    workers = Workers(spec.run(VALUES), spec.step(VALUES).directory, list(actions))
    return Trial(spec, 1, VALUES, workers), workers


def record(spec: Spec) -> dict | None:
    return spec.run(VALUES).read_json("trial.json")


@pytest.mark.parametrize("alike", [True, False])
def test_trials_that_train_alike_are_compared_by_their_training_loss(spec, alike):
    trial, _ = make(replace(spec, comparable_train_loss=alike), Workers.reach(1 / 9, 0.5, train_loss=0.8))
    assert trial.advance()["signal"] == pytest.approx(-0.8 - 0.1 if alike else 0.5 - 0.1)


def test_no_news_is_told_too_so_that_tune_can_stop_a_trial_at_any_time(spec):
    trial, _ = make(spec)
    assert trial.advance(seconds=0) == {"waiting": True}


def test_workers_that_cannot_go_on_are_ended_and_the_trial_recorded(spec, monkeypatch):
    monkeypatch.setattr(trials, "CHECK_SECONDS", 0)
    trial, workers = make(spec, Workers.report_error)
    assert trial.advance() == {"done": True}
    assert record(spec)["error"] == "out of GPU memory"
    assert workers.killed == 1


def test_lost_workers_are_replaced_as_long_as_the_trial_gets_on(spec):
    losses = [Workers.lose(f"{n:08d}.json") for n in range(6)]
    trial, workers = make(spec, *losses, Workers.end(0.7))
    assert trial.advance()["done"]
    assert len(workers.assignments) == 7
    assert record(spec)["status"] == "finished"


def test_workers_lost_again_and_again_without_progress_make_a_failed_trial(spec):
    limit = spec.config.durability.max_failures
    trial, workers = make(spec, *[Workers.lose()] * (limit + 1))
    assert trial.advance() == {"done": True}
    assert len(workers.assignments) == limit + 1
    assert "gave up" in record(spec)["error"]


def test_silent_workers_block_the_search_instead_of_failing_the_trial(spec, monkeypatch):
    monkeypatch.setattr(trials, "CHECK_SECONDS", 0)
    durability = spec.config.durability.model_copy(update={"start_timeout": 0.01})
    silent = Spec(**(spec.__dict__ | {"config": spec.config.model_copy(update={"durability": durability})}))
    trial, _ = make(silent, lambda workers: None, lambda workers: time.sleep(0.05))
    with pytest.raises(trials.TrialBlocked, match=r"durability\.start_timeout"):
        trial.advance()
    assert record(silent) is None
