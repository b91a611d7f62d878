"""Trials of a search on real workers: scored at rungs, ended early, gone on with, diverged."""

import json

import pytest

from pipelines.config.loading import load_config
from pipelines.data.held_out import training_view
from pipelines.runs.identity import base_fingerprint
from pipelines.search.step_search import search_of_step
from pipelines.search.trial import Trial, prune
from pipelines.search.trial_spec import Spec
from pipelines.workers.assignment import verdict_file

RUNGS = (1 / 9, 1 / 3)
VALUES = {"training.learning_rate": 1e-2}


class Group:
    """A worker group, and what it was asked to do."""

    def __init__(self, group):
        self.group, self.assignments = group, []

    def submit(self, assignment: dict) -> int:
        self.assignments.append(assignment)
        self.number = self.group.submit(assignment)
        return self.number

    def wait(self, number: int, seconds: float) -> dict | None:
        return self.group.wait(number, seconds)

    def idle(self) -> None:
        """Until the workers are done with what they were asked last."""
        assert self.group.wait(self.number, 60)


@pytest.fixture(scope="module")
def config(bench):
    """The first task with a search over its learning rate, one worker, nine steps."""
    search = {
        "space": {"training.learning_rate": [1e-3, 1e-2]},
        "objective": {"retention_weight": 0, "max_examples": 24},
    }
    changes = {"tasks": bench.raw["tasks"][:1], "retention": [], "resources": {"workers": 1}, "search": search}
    training = bench.raw["training"] | {"max_steps": 9}
    return training_view(load_config(bench.config("trial", **changes, training=training)))


@pytest.fixture
def group(bench, config) -> Group:
    return Group(bench.warm.group(config))


@pytest.fixture
def spec(config, tmp_path) -> Spec:
    base = base_fingerprint(config.base_model)
    target = search_of_step(config, 1, base, base)
    return Spec(
        config=target.trial_config,
        uri=str(tmp_path / "search"),
        position=1,
        tasks=target.tasks,
        parent=base,
        parent_files=None,
        base_fingerprint=base,
        base_directory=f"steps/0-base-{base[:8]}",
        identities=target.identities,
        names=target.names,
        cell_keys=target.cell_keys,
        weight=0.0,
        rungs=RUNGS,
        reduction=3,
    )


def next_report(trial: Trial) -> dict:
    """The next report with news."""
    while (report := trial.advance()) == {"waiting": True}:
        pass
    return report


def record(spec: Spec, values: dict = VALUES) -> dict | None:
    return spec.run(values).read_json("trial.json")


def adapter(spec: Spec) -> bytes:
    return spec.run(VALUES).read_bytes(f"{spec.step(VALUES).directory}/adapter/adapter_model.safetensors")


def test_reports_at_each_rung_and_at_its_end_and_is_not_repeated(spec, group):
    trial, run = Trial(spec, 1, VALUES, group), spec.run(VALUES)
    reports = [next_report(trial)]
    assert run.read_json(verdict_file(RUNGS[0])) is None  # the scheduler has not spoken yet
    reports.append(next_report(trial))
    assert run.read_json(verdict_file(RUNGS[0])) == {"go_on": True}
    reports.append(next_report(trial))
    assert [(report["resource"], report.get("done", False)) for report in reports] == [
        (1, False),
        (3, False),
        (9, True),
    ]
    found = record(spec)
    assert (found["status"], found["steps"], found["objective"]) == ("finished", 9, reports[-1]["objective"])
    assert [rung["step"] for rung in found["rungs"]] == [1, 3]
    assert [rung["objective"] for rung in found["rungs"]] == [report["objective"] for report in reports[:2]]
    scores = {cell.name: cell.value for cell in run.metrics(spec.step(VALUES).directory).cells}
    assert found["scores"] == scores and found["objective"] == scores["part"]
    assert found["setting"]["training"]["learning_rate"] == 1e-2
    json.dumps([assignment.to_json() for assignment in group.assignments], allow_nan=False)

    again = Trial(spec, 1, VALUES, group)
    assert [next_report(again) for _ in reports] == reports
    assert len(group.assignments) == 1
    assert prune(spec, 1, VALUES)["status"] == "finished"  # it is not made less
    assert not run.stop_requested()


def test_a_pruned_trial_ends_at_its_rung_and_goes_on_from_there_to_the_same_bits(spec, group, tmp_path):
    trial, run = Trial(spec, 1, VALUES, group), spec.run(VALUES)
    first = next_report(trial)
    found = prune(spec, 1, VALUES)
    group.idle()
    assert (found["status"], found["steps"], found["total_steps"]) == ("pruned", 1, 9)
    assert found["objective"] == first["objective"]
    assert run.metrics(spec.step(VALUES).directory) is None

    again = Trial(spec, 1, VALUES, group)
    assert next_report(again)["resource"] == 1
    assert len(group.assignments) == 1
    assert [next_report(again)["resource"], next_report(again)["resource"]] == [3, 9]
    assert not run.stop_requested()
    assert record(spec)["status"] == "finished"
    assert run.metrics(spec.step(VALUES).directory).training.resumed_at == [1]

    calm = Spec(**(spec.__dict__ | {"uri": str(tmp_path / "calm")}))
    undisturbed = Trial(calm, 1, VALUES, group)
    while not next_report(undisturbed).get("done"):
        pass
    assert adapter(spec) == adapter(calm)


def test_training_that_diverges_is_recorded_with_its_reason_and_the_workers_go_on(spec, group):
    values = {"training.learning_rate": 100.0, "training.weight_decay": 100.0}
    trial = Trial(spec, 1, values, group)
    while not next_report(trial).get("done"):
        pass
    assert record(spec, values)["status"] == "failed"
    assert "not finite" in record(spec, values)["error"]
    workers = group.group.queue.placement_group
    assert next_report(Trial(spec, 2, VALUES, group))["resource"] == 1
    prune(spec, 2, VALUES)
    group.idle()
    assert group.group.queue.placement_group == workers
