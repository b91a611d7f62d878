"""Whole records for tests that care about a few of their fields."""

from __future__ import annotations

from pipelines.runs.results import Results
from pipelines.runs.step_record import Cell, Seconds, StepRecord, Training

MOMENT = 1_760_000_000.0


def cell(name: str = "task", metric: str = "accuracy", value: float = 0.5, **fields) -> Cell:
    """A cell; of NLLs both `value` and `nll`."""
    nll = value if metric == "nll" else None
    known = {"role": "task", "nll": nll, "perplexity": None, "count": 10, "tokens": None, "majority": None}
    known |= {"digest": "d", "key": "k", "seconds": 1.0, "time": MOMENT}
    return Cell(name=name, metric=metric, value=value, **known | fields)


def training(steps: int = 2, **fields) -> Training:
    known = {"tokens": 64, "tokens_per_second": 32.0, "final_loss": 0.4, "curve": [[steps, 0.4, 1e-3, MOMENT]]}
    return Training(steps, **known | fields)


def step_record(fingerprint: str = "f" * 32, tasks: tuple[str, ...] = (), **fields) -> StepRecord:
    """Row 0 without tasks, else a step that was trained."""
    known = {"position": int(bool(tasks)), "parent": "b" * 32 if tasks else None, "cells": (), "environment": {}}
    known |= {"started": MOMENT, "finished": MOMENT + 95}
    known |= {"seconds": Seconds(train=2.0, evaluate=1.0, overhead=0.5, total=3.5)}
    if tasks:
        known |= {"trainable_parameters": 1, "head_parameters": 2, "adapter_bytes": 7, "files": {}, "data": {}}
        known |= {"training": training()}
    return StepRecord(fingerprint=fingerprint, tasks=tasks, **known | fields)


def results(status: str = "finished", **fields) -> Results:
    return Results(**{"run": "run", "status": status, "base_model": "base"} | fields)
