"""Sends what steps tell during training (`runs/live.py`) to their MLflow runs, while they train.

A point has the optimizer step and the time that metrics.json will have, so sending it again adds nothing, whoever
does so: the driver, a driver that continues the run, or the projection of the finished step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.lineage.mlflow_records import Target, flatten, send_metrics, send_params
from pipelines.lineage.step_runs import new_child
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, live_folder
from pipelines.runs.live import LiveStep, read_curve, read_live
from pipelines.runs.records import curve_points, series_points, validation_points
from pipelines.runs.step_record import StepRecord


@dataclass
class Cursor:
    """How much of a step has been sent: up to an optimizer step of the curve and of the validations, and to a
    moment of the series."""

    run_id: str
    step: int = 0
    validated: int = 0
    moment: float = 0.0


def in_training(run: RunDirectory, chain: Collection[str] | None) -> Iterator[LiveStep]:
    """The steps of a chain (None: all) that are being trained or were interrupted."""
    for name in run.list("live"):
        live = read_live(run, f"live/{name}")
        if live and (chain is None or live.step.fingerprint in chain):
            yield live


def send_live(
    to: Target, parent_id: str, children: dict[str, str], cursors: dict[str, Cursor], live: LiveStep
) -> None:
    """Send what is new of a step in training; creates its run if there is none.

    Args:
        children: step fingerprint → MLflow run id.
        cursors: step fingerprint → what this process has sent.
    """
    name = live.step.fingerprint
    cursor = cursors.get(name)
    if cursor is None:
        cursor = cursors[name] = Cursor(_opened(to, parent_id, children, live.step))
    curve = read_curve(to.run, live_folder(name), cursor.step)
    series = [point for point in series_points(live.series) if point[2] > cursor.moment]
    validated = validation_points([point for point in live.validation if point[0] > cursor.validated])
    send_metrics(to, cursor.run_id, [*curve_points(curve), *validated, *series])
    cursor.step = int(curve[-1][0]) if curve else cursor.step
    cursor.validated = max((point[3] for point in validated), default=cursor.validated)
    cursor.moment = max((point[2] for point in series), default=cursor.moment)


def _opened(to: Target, parent_id: str, children: dict[str, str], step: StepRecord) -> str:
    """Id of the step's MLflow run, which is running and has the parameters known so far."""
    name = step.fingerprint
    if name in children:
        child = to.client.get_run(children[name])
    else:
        plan = StepPlan(step.position, step.tasks, name, step.parent)
        child = new_child(to, parent_id, plan.directory, step)
        children[name] = child.info.run_id
    if child.info.status != "RUNNING":
        to.client.update_run(child.info.run_id, "RUNNING")
    known: dict[str, Any] = step.setting.to_json() if step.setting else {}
    send_params(to, child, flatten(known | {"environment": step.environment}))
    return child.info.run_id
