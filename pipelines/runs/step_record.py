"""What the workers record of a step: `metrics.json` and its parts.

    {"fingerprint": "0f3a…", "position": 2, "tasks": ["sst2"], "parent": "77c1…", "setting": {"adapter": {…}, …},
     "data": {"sst2": {"train": {"digest": "…", "rows": 67349}}}, "files": {"adapter/adapter_model.safetensors": …},
     "training": {"steps": 100, "curve": [[1, 2.3, 0.003, 1.76e9], …], …},
     "cells": [{"name": "sst2", "value": 0.91, …}, …], "seconds": {"train": 70.2, …}, …}

Row 0, the state before the first step, has cells but none of the fields that training produces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.runs.record import OPTIONAL, Record
from pipelines.runs.samples import Sample

Series = dict[str, list[list[float]]]  # metric → [optimizer step, value, Unix time]


def base_directory(fingerprint: str) -> str:
    """The step directory of row 0 in a chain that starts at the base."""
    return f"steps/0-base-{fingerprint[:8]}"


def step_label(tasks: Sequence[str]) -> str:
    """Name of a step: its task, or `joint` if it trains on several at once."""
    return tasks[0] if len(tasks) == 1 else "joint"


@dataclass(frozen=True)
class Cell(Record):
    """One cell of the score matrix, or a measurement on a retention corpus or a benchmark.

    Attributes:
        role: `task`, `retention` (text that no task trains on) or `benchmark`.
        value: score in the unit of `metric`.
        nll: nats per token; None if the task has none.
        count: number of examples.
        majority: score of always answering the most frequent class.
        digest: digest of the test data.
        key: identity of the score: test data, metric, and how it is measured.
        time: Unix time of the measurement.
        extras: other metrics of the same outcomes.
        loss: cross-entropy of the correct class; None if there are no classes.
    """

    name: str
    role: str
    metric: str
    value: float
    nll: float | None
    perplexity: float | None
    count: int
    tokens: int | None
    majority: float | None
    digest: str
    key: str
    seconds: float
    time: float
    higher_is_better: bool = True
    extras: dict[str, float] = field(default_factory=dict)
    loss: float | None = None


@dataclass(frozen=True)
class Seconds(Record):
    """Time spent by a step or a run, by phase; None for phases that are not done."""

    train: float | None = field(default=None, metadata=OPTIONAL)
    evaluate: float | None = field(default=None, metadata=OPTIONAL)
    overhead: float | None = field(default=None, metadata=OPTIONAL)
    total: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Setting(Record):
    """The sections of the configuration that determine a step's training; part of its fingerprint."""

    adapter: dict[str, Any]
    strategy: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of(cls, config: PipelineConfig) -> Setting:
        return cls(config.adapter.model_dump(), config.strategy.model_dump(), config.training.identity())


@dataclass(frozen=True)
class Split(Record):
    """Digest and number of the rows of a split."""

    digest: str
    rows: int


@dataclass(frozen=True)
class TaskData(Record):
    """Training data of a task; `validation` are the rows that decided which state was kept."""

    train: Split
    validation: Split | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class PublishedFile(Record):
    """Size and digest of a published file of a step."""

    bytes: int
    sha256: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Validated(Record):
    """Validation during a step.

    Attributes:
        curve: [optimizer step, loss, Unix time] of every validation.
        best_step, best_loss: of the state that the step has kept.
        rows: number of validation rows, packed documents counting as one.
        stopped_early: whether training ended before its last planned optimizer step.
    """

    curve: list[list[float]]
    best_step: int
    best_loss: float
    rows: int
    stopped_early: bool


@dataclass(frozen=True)
class Training(Record):
    """Outcome of a step's training.

    Attributes:
        steps: optimizer steps.
        curve: [optimizer step, loss, learning rate, Unix time] of every step.
        resumed_at: optimizer steps at which it resumed from a checkpoint.
        series: speed and load of the machine during training.
        validation: None without `training.validate_every`.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    final_loss: float | None
    curve: list[list[float]]
    resumed_at: list[int] = field(default_factory=list)
    series: Series | None = field(default=None, metadata=OPTIONAL)
    validation: Validated | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class SelfTest(Record):
    """A few logits that the worker computed, against which anyone who loads the adapter can check it."""

    input_ids: list[int]
    last_logits: list[float]


@dataclass(frozen=True)
class TrainedStep(Record):
    """`trained.json`: a step that is trained and saved but not yet scored.

    Attributes:
        files: path below the step directory → what was published.
        seconds: `train` and `total` so far.
    """

    trainable_parameters: int
    head_parameters: int
    adapter_bytes: int
    files: dict[str, PublishedFile]
    training: Training
    started: float
    seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """`metrics.json` of a step. Fields that training produces are None in row 0.

    Attributes:
        parent: fingerprint of the step that it was trained from; None for the base.
        parent_run: URI of the parent's run if that is another one.
        depth: steps from the base to this one, inclusive.
        data: task → its training data.
        classes: classification task → its class names.
        peak_memory_bytes: peak of the worker that wrote this record.
        started, finished: Unix time.
        samples: answers to `evaluation.samples`; None if nothing was asked.
        environment: versions, hardware, commit.
        origin: folder or hub id that the adapter was imported from; it was not trained here.
    """

    fingerprint: str
    position: int
    tasks: tuple[str, ...]
    parent: str | None
    parent_run: str | None = None
    depth: int | None = field(default=None, metadata=OPTIONAL)
    setting: Setting | None = field(default=None, metadata=OPTIONAL)
    data: dict[str, TaskData] | None = field(default=None, metadata=OPTIONAL)
    classes: dict[str, list[str]] | None = field(default=None, metadata=OPTIONAL)
    peak_memory_bytes: int | None = None
    finished: float
    trainable_parameters: int | None = field(default=None, metadata=OPTIONAL)
    head_parameters: int | None = field(default=None, metadata=OPTIONAL)
    adapter_bytes: int | None = field(default=None, metadata=OPTIONAL)
    files: dict[str, PublishedFile] | None = field(default=None, metadata=OPTIONAL)
    training: Training | None = field(default=None, metadata=OPTIONAL)
    started: float
    cells: tuple[Cell, ...]
    samples: tuple[Sample, ...] | None = field(default=None, metadata=OPTIONAL)
    self_test: SelfTest | None = field(default=None, metadata=OPTIONAL)
    seconds: Seconds
    environment: dict[str, Any]
    origin: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def label(self) -> str:
        return step_label(self.tasks) if self.position else "base"

    @property
    def grew_from_base(self) -> bool:
        """Whether this is the first step after the base."""
        depth = self.position if self.depth is None else self.depth
        return self.position > 0 and depth == 1 and self.parent_run is None

    def unmeasured_parent(self) -> StepRecord:
        """Row 0 of a chain that had nothing to score the base on, so that no worker recorded it."""
        return StepRecord(
            fingerprint=self.parent,
            position=0,
            tasks=(),
            parent=None,
            finished=self.started,
            started=self.started,
            cells=(),
            seconds=Seconds(train=0.0, evaluate=0.0, overhead=0.0, total=0.0),
            environment={},
        )

    @property
    def curve(self) -> list[list[float]]:
        """`Training.curve`; empty in row 0."""
        return self.training.curve if self.training else []
