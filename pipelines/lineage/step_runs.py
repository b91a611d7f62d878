"""The MLflow run of a step, a child of its chain's run: found or created."""

from __future__ import annotations

from typing import Any

from pipelines.lineage.mlflow_records import (
    PREFIX,
    TAG_LENGTH,
    Target,
    common_tags,
    identity,
    milliseconds,
    search_runs,
)
from pipelines.runs.step_record import StepRecord


def children_of(to: Target, parent_id: str) -> dict[str, Any]:
    """Step fingerprint → MLflow run of every step of a chain."""
    tags = {"mlflow.parentRunId": parent_id, PREFIX + "kind": "step"}
    found = search_runs(to.client, [to.experiment_id], tags)
    return {child.data.tags[PREFIX + "step_fingerprint"]: child for child in found}


def new_child(to: Target, parent_id: str, directory: str, metrics: StepRecord):
    """Create the run of a step, finished or in training."""
    tags = {
        "mlflow.parentRunId": parent_id,
        PREFIX + "kind": "step",
        PREFIX + "run": to.run.name,
        PREFIX + "run_uri": identity(to.run),
        PREFIX + "step_fingerprint": metrics.fingerprint,
        PREFIX + "step_directory": directory,
        PREFIX + "parent_fingerprint": metrics.parent or "",
        PREFIX + "task": metrics.label,
        PREFIX + "tasks": ",".join(metrics.tasks)[:TAG_LENGTH],
        PREFIX + "position": str(metrics.position),
        **common_tags(to.config),
    }
    if origin := metrics.parent_run:
        tags[PREFIX + "parent_run"] = origin
    if metrics.origin:
        tags[PREFIX + "origin"] = metrics.origin
    if commit := metrics.environment.get("git_commit"):
        tags["mlflow.source.git.commit"] = commit
    name = f"{metrics.position}-{metrics.label}"
    return to.client.create_run(to.experiment_id, milliseconds(metrics.started), tags, name)
