"""Events of a run: `events/*.json`, `progress.json`, and what a driver reports to its caller."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any

from pipelines.runs.record import OPTIONAL, Record
from pipelines.runs.step_record import Cell


@dataclass(frozen=True)
class Event(Record):
    """One event. Its kind determines its fields; fields that no code reads by name are in `other`.

    Attributes:
        kind: started, step_started, training, checkpoint, published, failed, finished, …
        time: Unix time.
        fingerprint, task, position: the step of the chain that it concerns.
        step, steps: optimizer steps done, and in all (`started`: steps of the chain; `segment_finished`: which).
        done: steps of the chain that are done already (`evaluating`: examples; `writing`: rows).
        count: number of all of what `done` counts.
        seconds: what it took (`published`: the parts of it).
        worker, serial: the writer of a progress record, and the record's number.
    """

    kind: str
    time: float = field(default_factory=time.time)
    fingerprint: str | None = field(default=None, metadata=OPTIONAL)
    task: str | None = field(default=None, metadata=OPTIONAL)
    position: int | None = field(default=None, metadata=OPTIONAL)
    step: int | None = field(default=None, metadata=OPTIONAL)
    steps: int | list[str] | None = field(default=None, metadata=OPTIONAL)
    loss: float | None = field(default=None, metadata=OPTIONAL)
    seconds_left: float | None = field(default=None, metadata=OPTIONAL)
    tokens_per_second: float | None = field(default=None, metadata=OPTIONAL)
    done: int | None = field(default=None, metadata=OPTIONAL)
    count: int | None = field(default=None, metadata=OPTIONAL)
    name: str | None = field(default=None, metadata=OPTIONAL)
    text: str | None = field(default=None, metadata=OPTIONAL)
    error: str | None = field(default=None, metadata=OPTIONAL)
    reason: str | None = field(default=None, metadata=OPTIONAL)
    cells: tuple[Cell, ...] | None = field(default=None, metadata=OPTIONAL)
    seconds: Any = field(default=None, metadata=OPTIONAL)
    worker: str | None = field(default=None, metadata=OPTIONAL)
    serial: int | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def of(cls, kind: str, **details: Any) -> Event:
        """An event with the current time and any details."""
        named = {name: value for name, value in details.items() if name in NAMED}
        return cls(kind, **named, other={name: value for name, value in details.items() if name not in NAMED})


NAMED = {f.name for f in fields(Event)}
