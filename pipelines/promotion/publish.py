"""What follows a finished chain: verdict, report, record in MLflow, registered version.

Made anew only where something changed. The driver does this at the end of a run, `curlora sync` where MLflow was away
then; both come to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import LineageError, RunDirectoryError
from pipelines.lineage.projection import project
from pipelines.promotion import promotion
from pipelines.promotion.promotion import settle
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.results import Results, StepSummary

STAMP = "published.json"

Send = Callable[[], tuple[dict[str, str], str | None]]  # → (step fingerprint → MLflow run id, warning)


def already_published(run: RunDirectory, config: PipelineConfig, results: Results) -> Results | None:
    """The results with what was published of them, if nothing has changed since; None: there is something to do."""
    stamp = run.read_json(STAMP) or {}
    if stamp.get("identity") != _identity(results, config) or not (stamp["lineage"] or config.tracking is None):
        return None
    steps = _with_run_ids(results.steps, stamp["runs"])
    return replace(results, steps=steps, gate=stamp["gate"], registry=stamp["registry"])


def publish(run: RunDirectory, config: PipelineConfig, results: Results, send: Send) -> tuple[Results, list[str]]:
    """Judge, report, send, register and promote a finished run; (results as written, warnings).

    Args:
        send: brings MLflow up to the run directory.
    """
    undecided = not results.gate or results.gate["passed"] is None
    verdict = promotion.decide(run, config, results) if undecided else results.gate
    results = replace(results, gate=verdict, registry=None)
    run.write_json("results.json", results)
    write_pages(run, figures=True)
    runs, warning = send() if config.tracking else ({}, None)
    results = replace(results, steps=_with_run_ids(results.steps, runs))
    notes = []
    if runs and warning is None:
        try:
            results = replace(results, registry=promotion.settle(run, config, results, runs, config.tracking.uri))
        except (LineageError, RunDirectoryError) as error:  # MLflow away, or a run that it started from gone
            warning = str(error)
        if failure := (results.registry or {}).get("hook_failure"):
            notes.append(failure)
    run.write_json("results.json", results)
    if runs and warning is None:
        write_pages(run, figures=False)
        _, warning = send()  # once more: now the pages name the MLflow runs and the version
    stamp(run, config, results, runs, warning is None)
    return results, [*([warning] if warning else []), *notes]


def stamp(run: RunDirectory, config: PipelineConfig, results: Results, runs: dict[str, str], sent: bool) -> None:
    """Remember what was published, and whether MLflow has it."""
    published = {"gate": results.gate, "registry": results.registry, "runs": runs, "lineage": sent}
    run.write_json(STAMP, {"identity": _identity(results, config), **published})


def sync(run: RunDirectory, uri: str | None = None) -> tuple[dict[str, str], str, list[str]]:
    """Send a run to MLflow (again): to its own store with all that follows, to another one as a copy.

    Returns:
        step fingerprint (and "parent") → MLflow run id, the store, warnings.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    config, results = run.config(), run.results()
    tracking = config.tracking
    target = uri or (tracking.uri if tracking else "sqlite:///mlflow.db")
    experiment = (tracking.experiment if tracking else None) or config.name
    finished = results is not None and results.is_finished
    if finished and tracking and target == tracking.uri and not already_published(run, config, results):
        _, warnings = publish(run, config, results, lambda: (project(run, target, experiment), None))
        return run.read_json(STAMP)["runs"], target, warnings
    ids = project(run, target, experiment)
    if finished:
        settle(run, config, results, ids, target)
    return ids, target, []


def write_pages(run: RunDirectory, figures: bool) -> None:
    # matplotlib; a run that has nothing new to show needs none of it
    from pipelines.reporting.page import write_figures, write_report

    if figures:
        write_figures(run)
    write_report(run)


def _identity(results: Results, config: PipelineConfig) -> str:
    model = config.tracking.register_as if config.tracking else None
    gate = config.gate.model_dump() if config.gate else None
    steps = [step.fingerprint for step in results.steps]
    return fingerprint([results.scores, results.nll, steps, model, gate])


def _with_run_ids(steps: Sequence[StepSummary], runs: dict[str, str]) -> tuple[StepSummary, ...]:
    return tuple(replace(step, mlflow_run_id=runs.get(step.fingerprint)) for step in steps)
