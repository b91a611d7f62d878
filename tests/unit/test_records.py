"""Typed records: what a run directory holds is read by name and written again without a loss."""

import dataclasses
import json

import pytest

from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.record import Record
from pipelines.runs.results import Results
from pipelines.runs.step_record import Cell, Seconds, StepRecord

CELL = {
    "name": "sst2",
    "role": "task",
    "metric": "accuracy",
    "value": 0.91,
    "nll": None,
    "perplexity": None,
    "count": 872,
    "tokens": None,
    "majority": 0.51,
    "digest": "d",
    "key": "k",
    "seconds": 3.5,
    "time": 1_760_000_000.25,
    "higher_is_better": True,
    "extras": {"macro_f1": 0.9},
    "loss": 0.31,
}

BASE = {  # row 0, with all that it has
    "fingerprint": "b" * 32,
    "position": 0,
    "tasks": [],
    "parent": None,
    "parent_run": None,
    "peak_memory_bytes": 1 << 30,
    "finished": 1_760_000_050.0,
    "started": 1_760_000_000.0,
    "cells": [CELL],
    "seconds": {"train": 0.0, "evaluate": 3.5, "overhead": 0.0, "total": 3.5},
    "environment": {"torch": "2.13.0", "git_changed": False},
}

STEP = {
    "fingerprint": "s" * 32,
    "position": 1,
    "tasks": ["sst2"],
    "parent": "b" * 32,
    "parent_run": None,
    "depth": 1,
    "setting": {"adapter": {"type": "lora", "r": 8}, "strategy": {"name": "ewc"}, "training": {"seed": 0}},
    "data": {"sst2": {"train": {"digest": "t", "rows": 67_349}}},
    "classes": {},
    "peak_memory_bytes": 1 << 30,
    "finished": 1_760_000_200.0,
    "trainable_parameters": 2304,
    "head_parameters": 0,
    "adapter_bytes": 9216,
    "files": {"adapter/adapter_model.safetensors": {"bytes": 9216, "sha256": "f" * 64}},
    "training": {
        "steps": 2,
        "tokens": 512,
        "tokens_per_second": 3510.9,
        "final_loss": 0.4,
        "curve": [[1, 0.9, 3e-3, 1_760_000_101.0], [2, 0.4, 1e-3, 1_760_000_102.0]],
        "resumed_at": [1],
    },
    "started": 1_760_000_100.0,
    "cells": [CELL, CELL | {"name": "wikitext2", "role": "retention", "metric": "nll", "value": 4.4, "nll": 4.4}],
    "samples": [
        {"key": "g", "task": None, "row": None, "prompt": "Hello", "reference": None, "answer": "Hi"},
        {"key": "q", "task": "sst2", "row": 3, "prompt": "a", "reference": "b", "answer": "c", "generated": ""},
    ],
    "self_test": {"input_ids": [1, 2], "last_logits": [0.5, -0.5]},
    "seconds": {"train": 70.0, "evaluate": 15.0, "overhead": 10.0, "total": 95.0},
    "environment": {"torch": "2.13.0", "base_numbers_held": 5},
}


@pytest.mark.parametrize("raw", [BASE, STEP], ids=["row-0", "step"])
def test_a_step_record_is_written_exactly_as_it_was_read(raw):
    assert json.dumps(StepRecord.from_json(raw).to_json()) == json.dumps(raw)


def test_parts_of_a_step_record_are_read_by_name():
    step = StepRecord.from_json(STEP)
    assert step.cells[1].metric == "nll" and step.cells[0].extras == {"macro_f1": 0.9}
    assert step.data["sst2"].train.rows == 67_349
    assert step.files["adapter/adapter_model.safetensors"].bytes == 9216
    assert step.training.curve[-1][1] == step.training.final_loss
    assert step.tasks == ("sst2",) and step.label == "sst2"
    assert StepRecord.from_json(BASE).label == "base" and StepRecord.from_json(BASE).training is None


def test_a_field_of_another_version_survives_that_a_record_is_changed(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write_json("steps/1-sst2-s/metrics.json", STEP | {"later": [1], "cells": [CELL | {"latest": {"x": 2}}]})
    step = run.metrics("steps/1-sst2-s")
    run.write_json("steps/1-sst2-s/metrics.json", dataclasses.replace(step, finished=0.0))
    found = run.read_json("steps/1-sst2-s/metrics.json")
    assert found["later"] == [1] and found["cells"][0]["latest"] == {"x": 2} and found["finished"] == 0.0


def test_fields_that_earlier_versions_did_not_write_have_a_default():
    lacking = {name: value for name, value in CELL.items() if name not in ("higher_is_better", "extras", "loss")}
    cell = Cell.from_json(lacking)
    assert cell.higher_is_better and cell.extras == {} and cell.loss is None
    old = {name: value for name, value in STEP.items() if name not in ("depth", "classes", "self_test", "parent_run")}
    assert StepRecord.from_json(old).depth is None


def test_a_missing_field_that_every_version_wrote_is_named():
    with pytest.raises(TypeError, match="fingerprint"):
        StepRecord.from_json({name: value for name, value in BASE.items() if name != "fingerprint"})


def test_results_of_a_trial_without_a_score_matrix_are_read():
    step = {"task": "sst2", "fingerprint": "s", "directory": "steps/1-sst2-s", "seconds": {}}
    raw = {"run": "t", "status": "stopped", "base_model": "m", "tasks": ["sst2"], "steps": [step]}
    results = Results.from_json(raw)
    assert not results.is_finished and results.scores == [] and not results.steps[0].is_done
    assert results.steps[0].seconds == Seconds()


def test_an_event_keeps_what_has_no_name(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.event("checkpoint", task="sst2", step=5, bytes=12, before=None, cells=(Cell.from_json(CELL),))
    ((name, event),) = RunDirectory(str(tmp_path)).events()
    assert (event.kind, event.task, event.step, event.other) == (
        "checkpoint",
        "sst2",
        5,
        {"bytes": 12, "before": None},
    )
    assert event.cells[0].value == 0.91
    written = run.read_json(f"events/{name}")
    assert list(written)[:2] == ["kind", "time"] and written["cells"] == [CELL] and written["before"] is None
    assert Event.from_json(written) == event


def test_records_of_records_are_found_in_tuples_and_mappings():
    step = StepRecord.from_json(STEP)
    parts = [*step.cells, *step.data.values(), *step.files.values(), step.setting, step.training, step.seconds]
    assert all(isinstance(part, Record) for part in parts)
