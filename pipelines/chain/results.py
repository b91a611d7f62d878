"""Builds `results.json`: the score matrix and everything that is computed from it."""

from __future__ import annotations

from pipelines.chain.plan import Plan
from pipelines.config.pipeline import PipelineConfig
from pipelines.metrics import score_matrix
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.search.step_search import summaries


def build_results(config: PipelineConfig, plan: Plan, run: RunDirectory, status: str) -> dict:
    """`results.json`: the score matrix and everything computed from it."""
    last = plan.settings[-1]
    names = [task.name for task in config.tasks]
    rows = [run.metrics(plan.base_directory), *(run.metrics(step.directory) for step in plan.steps)]
    cells = [_cells_of(row, plan.cell_keys) for row in rows]
    scores = [[_value(row, name) for name in names] for row in cells]
    nll = {c.name: [_value(row, c.name, "nll") for row in cells] for c in config.retention}
    done = [row for row in rows[1:] if row]
    metric_names = [task.metric for task in config.tasks]
    learned_at = {name: plan.learned_at()[name] for name in names}
    first = next((row for row in done), {})
    results = {
        "run": config.name,
        "status": status,
        "base_model": config.base_model.path,
        "base_fingerprint": plan.base_fingerprint,
        "adapter": {"type": last.adapter.type, "r": last.adapter.r},
        "strategy": last.strategy.name,
        "start_from": {"run": plan.start.run_uri, "step": plan.start.directory} if plan.start else None,
        "tasks": names,
        "learned_at": learned_at,
        "metric": dict(zip(names, metric_names, strict=True)),
        "trainable_parameters": first.get("trainable_parameters"),
        "head_parameters": sum(row.get("head_parameters", 0) for row in done),
        "adapter_bytes": done[-1]["adapter_bytes"] if done else None,
        "scores": scores,
        "perplexity": {name: [score_matrix.perplexity(v) for v in series] for name, series in nll.items()},
        "nll": nll,
        "majority": {name: next((r[name]["majority"] for r in cells if name in r), None) for name in names},
        "extras": {name: found for name in names if any(found := [r.get(name, {}).get("extras") for r in cells])},
        **score_matrix.aggregates(scores, metric_names, nll, None if config.is_joint else list(learned_at.values())),
        "gate": None,
        "registry": None,
        "seconds": _seconds(run, [row for row in rows if row]),
        "steps": [_step_summary(step, row) for step, row in zip(plan.steps, rows[1:], strict=True)],
    }
    if config.search:
        results["searches"] = summaries(config, run, plan.steps, plan.base_fingerprint)
    return results


def _cells_of(row: dict | None, keys: dict[str, str]) -> dict[str, dict]:
    """name → cell, of the cells that this configuration asks for."""
    cells = row["cells"] if row else []
    return {cell["name"]: cell for cell in cells if keys.get(cell["name"]) == cell["key"]}


def _value(row: dict[str, dict], name: str, field: str = "value") -> float | None:
    return row[name][field] if name in row else None


def _step_summary(step: StepPlan, row: dict | None) -> dict:
    row = row or {}
    return {
        "task": step.label,
        "fingerprint": step.fingerprint,
        "directory": step.directory,
        "mlflow_run_id": None,
        "seconds": row.get("seconds", {}),
        "tokens_per_second": row.get("training", {}).get("tokens_per_second"),
        "peak_memory_bytes": row.get("peak_memory_bytes"),
    }


def _seconds(run: RunDirectory, rows: list[dict]) -> dict:
    """Where the time went; what is neither training nor evaluation is overhead (start-up, loading, saving)."""
    train = sum(row["seconds"]["train"] for row in rows)
    evaluate = sum(row["seconds"]["evaluate"] for row in rows)
    segments = sum(event["seconds"] for _, event in run.events() if event["kind"] == "segment_finished")
    total = max(segments, sum(row["seconds"]["total"] for row in rows))
    return {"total": total, "train": train, "evaluate": evaluate, "overhead": total - train - evaluate}
