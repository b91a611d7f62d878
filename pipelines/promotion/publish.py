"""Publishes a finished chain: verdict, report, records in MLflow, registered version.

Nothing is repeated unless the run has changed. The driver publishes at the end of a run; `curlora sync` does the same
later if MLflow could not be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import LineageError, NotRegistered
from pipelines.lineage.projection import Projection, Sent
from pipelines.notify.outbox import post
from pipelines.notify.sender import Sender
from pipelines.promotion import promotion
from pipelines.promotion.promotion import settle
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.results import Results, StepSummary

STAMP = "published.json"

Send = Callable[[], Sent]


def already_published(run: RunDirectory, config: PipelineConfig, results: Results) -> Results | None:
    """The results completed with what was published; None if they have changed since, or were not fully published."""
    stamp = run.read_json(STAMP) or {}
    if stamp.get("identity") != _identity(results, config) or not (stamp["lineage"] or config.tracking is None):
        return None
    steps = _with_run_ids(results.steps, stamp["runs"])
    return replace(results, steps=steps, gate=stamp["gate"], registry=stamp["registry"])


def publish(run: RunDirectory, config: PipelineConfig, results: Results, send: Send) -> tuple[Results, list[str]]:
    """Judge, report, send, register and promote a finished run; (results as written, warnings).

    Args:
        send: brings MLflow up to date with the run directory.
    """
    undecided = not results.gate or results.gate["passed"] is None
    verdict = promotion.decide(run, config, results) if undecided else results.gate
    results = replace(results, gate=verdict, registry=None)
    run.write_json("results.json", results)
    _tell_of_refusal(run, config, results)
    write_pages(run, figures=True)
    sent = send() if config.tracking else Sent()
    results = replace(results, steps=_with_run_ids(results.steps, sent.runs))
    notes: list[str] = []
    if sent.runs and sent.warning is None:
        try:
            registry, notes = _settle(run, config, results, sent.runs, config.tracking.uri)
            results = replace(results, registry=registry)
        except LineageError as error:  # MLflow is unreachable
            sent = replace(sent, warning=str(error))
    run.write_json("results.json", results)
    if sent.runs and sent.warning is None:
        write_pages(run, figures=False)
        sent = send()  # again: the pages now name the MLflow runs and the version
    stamp(run, config, results, sent)
    return results, [*([sent.warning] if sent.warning else []), *sent.unlogged, *notes]


def _tell_of_refusal(run: RunDirectory, config: PipelineConfig, results: Results) -> None:
    """Post a message if the gate refuses the run; the same verdict is told once."""
    if not results.gate or results.gate["passed"] is not False:
        return
    reasons = results.gate["reasons"]
    key = [results.steps[-1].fingerprint, reasons, results.gate.get("against")]
    text = f"{run.name}: the gate refuses it: {'; '.join(reasons)}"
    facts = {"run": run.name, "run_uri": run.uri, "reasons": reasons, "against": results.gate.get("against")}
    post(run, config.notify, "refusal", key, text, **facts)


def _settle(
    run: RunDirectory, config: PipelineConfig, results: Results, runs: dict[str, str], uri: str
) -> tuple[dict | None, list[str]]:
    """Register and promote a run; (`Results.registry`, what to warn of).

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    try:
        outcome = settle(run, config, results, runs, uri)
    except NotRegistered as error:
        name = config.tracking.register_as
        text = f"{run.name} is trained, but not registered as '{name}': {error}"
        post(run, config.notify, "failure", [text], text, run=run.name, run_uri=run.uri)
        return promotion.not_registered(name, str(error)), [f"not registered as '{name}': {error}"]
    failure = (outcome or {}).get("hook_failure")
    return outcome, [failure] if failure else []


def stamp(run: RunDirectory, config: PipelineConfig, results: Results, sent: Sent) -> None:
    """Record what was published, and whether all of it was sent to MLflow."""
    complete = sent.complete and not (results.registry or {}).get("failure")
    published = {"gate": results.gate, "registry": results.registry, "runs": sent.runs, "lineage": complete}
    run.write_json(STAMP, {"identity": _identity(results, config), **published})


def sync(
    run: RunDirectory, uri: str | None = None, note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, str], str, list[str]]:
    """Send a run to MLflow (again): publish it in its own store, or copy it to another one.

    Args:
        note: called with what fails nothing: what the server's limits have left out, undelivered messages.

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
    projection = Projection(run, target, experiment)
    if finished and tracking and target == tracking.uri and not already_published(run, config, results):
        _, warnings = publish(run, config, results, projection.send_all)
        runs = run.read_json(STAMP)["runs"]
    else:
        sent = projection.send_all()
        runs, more = sent.runs, _settle(run, config, results, sent.runs, target)[1] if finished else []
        warnings = [*sent.unlogged, *more]
    if projection.note:
        note(projection.note)
    for text in Sender(run, config.notify).finish():
        note(text)
    return runs, target, warnings


def write_pages(run: RunDirectory, figures: bool) -> None:
    """Write `report.html` and, on request, its figures."""
    # imports matplotlib, which a run without changes does not need
    from pipelines.reporting.page import write_figures, write_report

    if figures:
        write_figures(run)
    write_report(run)


def _identity(results: Results, config: PipelineConfig) -> str:
    model = config.tracking.register_as if config.tracking else None
    gate = config.gate.model_dump() if config.gate else None
    steps = [step.fingerprint for step in results.steps]
    shown = [results.samples] if results.samples else []  # the identity of runs without samples has not changed
    return fingerprint([results.scores, results.nll, steps, model, gate, *shown])


def _with_run_ids(steps: Sequence[StepSummary], runs: dict[str, str]) -> tuple[StepSummary, ...]:
    return tuple(replace(step, mlflow_run_id=runs.get(step.fingerprint)) for step in steps)
