"""What a step tells while it trains: its record so far, its curve and measurements, in `live/<fp8>/` of the run.

    step.json             the record of the step, without what training decides, and the series of measurements
    curve-<first>.json    `PART` points of the curve each; only the last file changes

The worker writes them every few seconds, the driver sends them on. They outlive a worker, so that steps which are
trained again after an interruption keep the moments that were sent already. They are deleted with the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.runs.directory import RunDirectory
from pipelines.runs.record import Record
from pipelines.runs.step_record import Series, StepRecord

PART = 1000  # optimizer steps per file
MOST_SAMPLES = 512  # per series


@dataclass(frozen=True)
class LiveStep(Record):
    """`step.json`: a step in training.

    Attributes:
        step: its record, without scores, files and training.
        series: metric → [optimizer step, value, Unix time] of every measurement.
        validation: [optimizer step, loss, Unix time] of every validation.
    """

    step: StepRecord
    series: Series = field(default_factory=dict)
    validation: list[list[float]] = field(default_factory=list)


def read_live(run: RunDirectory, folder: str) -> LiveStep | None:
    """`step.json`; None if there is none."""
    raw = run.read_json(f"{folder}/step.json")
    return None if raw is None else LiveStep.from_json(raw)


def write_live(run: RunDirectory, folder: str, live: LiveStep) -> None:
    run.write_json(f"{folder}/step.json", live)


def read_curve(run: RunDirectory, folder: str, after: int = 0) -> list[list[float]]:
    """Points of the curve after an optimizer step, in order; reads only the files that can hold them."""
    points = []
    for name in run.list(folder):
        if name.startswith("curve-") and _first(name) + PART > after + 1:
            points += run.read_json(f"{folder}/{name}") or []  # None: deleted meanwhile
    return [point for point in points if point[0] > after]


def write_curve(run: RunDirectory, folder: str, points: Sequence[Sequence[float]], after: int) -> None:
    """Write the files with points after an optimizer step.

    Args:
        points: the whole curve, in order.
    """
    parts: dict[int, list] = {}
    for point in points:
        parts.setdefault((int(point[0]) - 1) // PART, []).append(point)
    for number, part in parts.items():
        if part[-1][0] > after:
            run.write_json(f"{folder}/curve-{number * PART + 1:09d}.json", part)


def _first(name: str) -> int:
    return int(name.removeprefix("curve-").removesuffix(".json"))
