"""Sample answers as MLflow tables: those of a step on its run, those of all steps side by side on the chain's run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipelines.lineage.mlflow_records import Target, set_tags
from pipelines.runs.records import Steps, answers_of
from pipelines.runs.samples import Sample
from pipelines.runs.step_record import StepRecord

FILE = "samples.json"
OF_STEP = ("task", "prompt", "reference", "answer", "generated")


def send_step_table(to: Target, run, metrics: StepRecord) -> None:
    """Log the answers of a step, if it has any.

    Args:
        run: the step's run, as last read from MLflow.
    """
    if metrics.samples:
        _log(to, run, OF_STEP, [[getattr(sample, name) for name in OF_STEP] for sample in metrics.samples])


def send_chain_table(to: Target, run, steps: Steps, keys: Sequence[str] | None) -> None:
    """Log a table with a row per question and a column per step, if any step has answers.

    Args:
        keys: the questions (`Results.samples`).
    """
    records = [metrics for _, metrics in steps]
    if rows := answers_of(records, keys):
        columns = ["task", "prompt", *(_column(metrics) for metrics in records), "reference"]
        table = [
            [row.question.task, row.question.prompt, *map(_text, row.by_step), row.question.reference] for row in rows
        ]
        _log(to, run, columns, table)


def _column(metrics: StepRecord) -> str:
    return f"{metrics.position} {metrics.label}"


def _text(sample: Sample | None) -> str | None:
    if sample is None or sample.generated is None:
        return sample and sample.answer
    return f"{sample.answer} | {sample.generated}"


def _log(to: Target, run, columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """What `MlflowClient.log_table` writes; that would append the rows again whenever the table is sent."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS  # slow

    to.client.log_dict(run.info.run_id, {"columns": list(columns), "data": list(rows)}, FILE)
    known = json.loads(run.data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    entry = {"path": FILE, "type": "table"}
    if entry not in known:
        set_tags(to, run, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([*known, entry])})
