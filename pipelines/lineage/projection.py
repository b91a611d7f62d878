"""Projects a run directory into MLflow, idempotently; used by the driver during a run and by `curlora sync`.

Experiment = sequence, parent run = chain, child run = step. Everything is looked up by tag, created if missing and
sent with its original timestamps, so sending it again creates no duplicates. If MLflow is unreachable, the run loses
nothing and `project` raises a `LineageError`.

Conventions that dashboards can rely on, the same for every sequence:

    tags (`curlora.` + …)   kind (chain | step), run, run_uri, base_model, adapter, strategy on every run;
                            tasks, last_step, base_fingerprint, gate, gate_reasons on the parent;
                            step_fingerprint, parent_fingerprint, parent_run (if its parent is another run's step),
                            step_directory, task, tasks, position on a child; model_error if it has no logged model,
                            origin of an imported adapter, which has none either; params_left_out where the server
                            takes fewer parameters (all of them: artifact parameters.json)
    metrics of the parent   score/<task>, for generated answers also rouge_l/<task>, token_f1/<task> and
                            exact_match/<task>; for retained text nll/<corpus>, perplexity/<corpus>; step = position in
                            the sequence, 0 = untrained base; average_accuracy, forgetting, …; step = number of steps
    metrics of a child      train/loss, train/learning_rate, train/tokens_per_second, system/… (as MLflow names them),
                            validation/loss, sent while it trains, step = optimizer step; its own row of scores
                            and its cost
    inputs                  <task>/train and <name>/test with the digest of the run directory
    tables                  samples.json: answers to evaluation.samples; the parent's has a column per step
    logged model of a child the adapter (logged_models.py), its row of scores by dataset, its parent as input
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.lineage.live import Cursor, in_training, send_live
from pipelines.lineage.mlflow_records import (
    PREFIX,
    TAG_LENGTH,
    Target,
    common_tags,
    flatten,
    identity,
    limits_note,
    metric_datasets,
    milliseconds,
    search_runs,
    send_inputs,
    send_metrics,
    send_params,
    set_tags,
    upload_files,
    upload_folder,
)
from pipelines.lineage.sample_tables import send_chain_table, send_step_table
from pipelines.lineage.searches import project_searches
from pipelines.lineage.step_runs import children_of, new_child
from pipelines.lineage.store import artifact_root, connect, errors, quiet
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.live import LiveStep
from pipelines.runs.records import (
    Steps,
    cost_points,
    current_steps,
    ended_at,
    latest_moment,
    score_points,
    started_at,
    training_points,
)
from pipelines.runs.start import RECORD
from pipelines.runs.step_record import StepRecord
from pipelines.runs.verdict import Verdict

CONVENTIONS = 2  # version of the conventions above; a new version sends finished steps again

AGGREGATES = (
    "average_accuracy",
    "learning_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "perplexity_ratio",
    "nll_average",
    "nll_learning",
    "nll_backward_transfer",
)

CHAIN_NOTE = (
    "A sequence of tasks learned one after another. The step of every metric is the position in the sequence "
    "(0 = the untouched base), so each chart shows one task being learned and kept or forgotten. "
    "Child runs are the steps. The whole story: `report.html` among the artifacts."
)


def project(run: RunDirectory, uri: str, experiment: str, chain: Sequence[str] | None = None) -> dict[str, str]:
    """Bring MLflow up to date with the run directory; may be called repeatedly, also during the run.

    Args:
        run: the run directory.
        uri: MLflow tracking URI.
        experiment: name of the experiment, created if missing.
        chain: step fingerprints of the current plan, in order; default: those of `results.json`, else the chain
            that ends in the step finished last. Steps of an earlier configuration are not part of it.

    Returns:
        step fingerprint → MLflow run id, and `"parent"` → id of the parent run.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    return Projection(run, uri, experiment).send(chain)


@dataclass(frozen=True)
class Sent:
    """Outcome of a projection.

    Attributes:
        runs: step fingerprint (and "parent") → MLflow run id.
        warning: why not everything could be sent.
        unlogged: a sentence for every step whose model could not be logged.
        note: what the server's limits left out, which is in artifacts.
    """

    runs: dict[str, str] = field(default_factory=dict)
    warning: str | None = None
    unlogged: tuple[str, ...] = ()
    note: str | None = None

    @property
    def complete(self) -> bool:
        return self.warning is None and not self.unlogged


class Projection:
    """The projection of a run that a process keeps up to date.

    It caches what it has found or sent, so the cost per step does not grow with the length of the chain. After an
    error it looks everything up again.

    Attributes:
        unlogged: step fingerprint → why its model could not be logged; everything else of the step was sent.
        note: what the server's limits have left out so far.
    """

    def __init__(self, run: RunDirectory, uri: str, experiment: str):
        self.run, self.uri, self.experiment = run, uri, experiment
        self.unlogged: dict[str, str] = {}
        self.note: str | None = None
        self._known: _Known | None = None
        self._last: str | None = None  # fingerprint of the step that was sent last
        self._origin_is_sent = False
        self._cursors: dict[str, Cursor] = {}  # of steps in training

    def send(self, chain: Sequence[str] | None = None) -> dict[str, str]:
        """See `project`."""
        with errors(self.uri, f"nothing is lost; send it later with: curlora sync {self.run.uri}"), quiet():
            steps, client = current_steps(self.run, chain), connect(self.uri)
            self._send_origin()
            known, self._known = self._known, None  # dropped if an error follows
            known = self._refreshed(known, client, steps) or self._load(client, steps)
            ids = _send(known, steps)
            self._send_live(known, list(in_training(self.run, chain)))
            _close(known, steps, chain)
            self.unlogged, self.note = known.unlogged, limits_note(known.to) or self.note
            self._known, self._last = known, steps[-1][1].fingerprint if steps else None
            return ids

    def send_live(self, chain: Sequence[str] | None = None) -> None:
        """Send what steps in training have told since the last time.

        Raises:
            LineageError: MLflow cannot be reached or returns an error.
        """
        told = list(in_training(self.run, chain))
        if not told:
            return
        with errors(self.uri, f"nothing is lost; send it later with: curlora sync {self.run.uri}"), quiet():
            known, self._known = self._known, None  # dropped if an error follows
            known = known or self._load(connect(self.uri), current_steps(self.run, chain))
            self._send_live(known, told)
            self._known = known

    def _send_live(self, known: _Known, told: Sequence[LiveStep]) -> None:
        for live in told:
            if not known.sent.get(live.step.fingerprint):
                send_live(known.to, known.parent_id, known.children, self._cursors, live)

    def _send_origin(self) -> None:
        """Send the run that a plain adapter was imported as, on which this chain's ancestry ends."""
        record = None if self._origin_is_sent else self.run.read_json(RECORD)
        if record and record.get("source"):
            Projection(RunDirectory(record["run_uri"]), self.uri, self.experiment).send([record["fingerprint"]])
        self._origin_is_sent = True

    def send_all(self, chain: Sequence[str] | None = None) -> Sent:
        """`send`, with what could not be logged."""
        return Sent(self.send(chain), None, tuple(self.unlogged.values()), self.note)

    def _refreshed(self, known: _Known | None, client, steps: Steps) -> _Known | None:
        """The cache with a fresh parent run; None if that run was deleted or the steps belong to another chain.

        A step's fingerprint depends on its parent's, so the last fingerprint identifies all steps before it.
        """
        if known is None or self._last not in {None, *(metrics.fingerprint for _, metrics in steps)}:
            return None
        parent = client.get_run(known.parent_id)
        return replace(known, parent=parent) if parent.info.lifecycle_stage == "active" else None

    def _load(self, client, steps: Steps) -> _Known:
        from pipelines.lineage.logged_models import LoggedModels  # imports numpy, which most commands never need

        to = Target(client, _experiment(client, self.uri, self.experiment), self.run, self.run.config())
        parent_id = _parent(to, steps).info.run_id
        children = children_of(to, parent_id)
        models = LoggedModels(client, to.experiment_id, parent_id, self.run, to.config)
        ids = {name: child.info.run_id for name, child in children.items()}
        sent = {name: child.data.tags.get(PREFIX + "sent", "") for name, child in children.items()}
        return _Known(to, models, client.get_run(parent_id), ids, sent)


@dataclass(frozen=True)
class _Known:
    """What MLflow holds of a chain.

    Attributes:
        parent: the chain's run, as read before sending.
        children: step fingerprint → MLflow run id.
        sent: step fingerprint → digest of the content that was sent.
        unlogged: step fingerprint → why its model could not be logged.
    """

    to: Target
    models: Any
    parent: Any
    children: dict[str, str]
    sent: dict[str, str]
    unlogged: dict[str, str] = field(default_factory=dict)

    @property
    def parent_id(self) -> str:
        return self.parent.info.run_id


def _send(known: _Known, steps: Steps) -> dict[str, str]:
    known.models.steps = steps
    ids = {"parent": known.parent_id}
    for directory, metrics in steps:
        if metrics.position == 0:
            _send_base(known.to, known.parent, directory, metrics)
        else:
            ids[metrics.fingerprint] = _send_step(known, directory, metrics)
    _send_parent(known.to, known.models, known.parent, steps)
    project_searches(known.to, known.parent_id, ids)
    return ids


def _close(known: _Known, steps: Steps, chain: Sequence[str] | None) -> None:
    """End the runs of steps that will not be finished: all others if the chain failed, and those that left it."""
    results = known.to.run.results()
    failed = results is not None and results.status == "failed"
    finished = {metrics.fingerprint for _, metrics in steps}
    for name, run_id in known.children.items():
        gone = chain is not None and name not in chain
        if not known.sent.get(name) and name not in finished and (failed or gone):
            known.to.client.set_terminated(run_id, "KILLED" if gone else "FAILED")


def _experiment(client, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException  # slow

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        root = artifact_root(uri)
        folder = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        location = f"{root}/{folder}" if root else None
        # With this tag MLflow's UI opens the experiment on its runs, not as an LLM application.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(name, location, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another run has just created it
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(
            f"experiment '{name}' is deleted; restore it with `mlflow experiments restore -x "
            f"{experiment.experiment_id}` or set another tracking.experiment"
        )
    return experiment.experiment_id


# -- parent run = chain
def _parent(to: Target, steps: Steps):
    """The parent run of this chain.

    A fingerprint depends on that of the parent step, so the recorded last step belongs to this chain if and only if
    all steps before it do: an extended sequence continues its parent run; a sequence with a changed earlier step gets
    a new one, and the old run stays as a record.
    """
    tags = {PREFIX + "kind": "chain", PREFIX + "run": to.run.name, PREFIX + "run_uri": identity(to.run)}
    depth = {metrics.fingerprint: metrics.position for _, metrics in steps}
    candidates = []
    for found in search_runs(to.client, [to.experiment_id], tags):
        last = found.data.tags.get(PREFIX + "last_step")
        if last is None or last in depth:
            candidates.append((depth.get(last, -1), found.info.start_time, found))
    if candidates:
        return max(candidates, key=lambda item: item[:2])[2]
    tags |= {"mlflow.note.content": CHAIN_NOTE, **common_tags(to.config)}
    return to.client.create_run(to.experiment_id, milliseconds(started_at(to.run, steps)), tags, to.run.name)


def _send_parent(to: Target, models, parent, steps: Steps) -> None:
    """Send parameters, aggregates, report, figures and status of the chain."""
    run, run_id, results = to.run, parent.info.run_id, to.run.results()
    send_params(to, parent, flatten(to.config.model_dump(exclude={"name", "storage", "tracking"})))
    if results and results.is_finished and steps:
        moment = latest_moment(steps)
        aggregates = [(name, getattr(results, name), moment, steps[-1][1].position) for name in AGGREGATES]
        last = models.found.get(steps[-1][1].fingerprint)
        send_metrics(to, run_id, aggregates, last.model_id if last else None)
    models.link_chain(parent)
    files = ["config.yaml", "results.json", "report.html", *(f"figures/{name}" for name in run.list("figures"))]
    upload_files(to, run_id, {name: name for name in files if run.exists(name)})
    send_chain_table(to, parent, steps, results.samples if results else None)
    tags = {PREFIX + "tasks": ",".join(task.name for task in to.config.tasks)[:TAG_LENGTH]}
    if steps:
        tags[PREFIX + "last_step"] = steps[-1][1].fingerprint
        if not steps[0][1].parent_run:  # row 0 is the base, not another run's step
            tags[PREFIX + "base_fingerprint"] = steps[0][1].fingerprint
    if results and results.gate:
        tags |= gate_tags(results.gate)
    set_tags(to, parent, tags)
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(results.status if results else "", "RUNNING")
    if status != "RUNNING":
        ended = milliseconds(ended_at(run, steps))
        if (parent.info.status, parent.info.end_time) != (status, ended):
            to.client.set_terminated(run_id, status, ended)
    elif parent.info.status != "RUNNING":
        to.client.update_run(run_id, status)


def gate_tags(verdict: Mapping[str, Any]) -> dict[str, str]:
    """A verdict as tags, by which MLflow's list of runs can be filtered."""
    return {
        PREFIX + "gate": Verdict.of(verdict).value,
        PREFIX + "gate_reasons": "; ".join(verdict["reasons"])[:TAG_LENGTH],
    }


# -- child run = step
def _send_base(to: Target, parent, directory: str, metrics: StepRecord) -> None:
    """Send row 0 to the parent run: the base has no child run, its scores are the first points of the curves."""
    run_id, sent = parent.info.run_id, fingerprint([CONVENTIONS, metrics.to_json()])
    if parent.data.tags.get(PREFIX + "sent_base") == sent:
        return
    send_metrics(to, run_id, score_points(metrics))
    send_inputs(to, run_id, metrics)
    if to.run.exists(directory):
        upload_folder(to, run_id, directory, "base")
    else:  # scored on nothing
        to.client.log_text(run_id, json.dumps(metrics.to_json(), indent=1), "base/metrics.json")
    to.client.set_tag(run_id, PREFIX + "sent_base", sent)


def _send_step(known: _Known, directory: str, metrics: StepRecord) -> str:
    """Send everything of one step and return its run's id.

    The tag `sent`, set last, marks it as complete; a step without its model has `model_error` instead and is sent
    again by the next process.
    """
    to, name, digest = known.to, metrics.fingerprint, fingerprint([CONVENTIONS, metrics.to_json()])
    if known.sent.get(name) == digest:
        return known.children[name]
    if name in known.children:
        child = to.client.get_run(known.children[name])
    else:
        child = new_child(to, known.parent_id, directory, metrics)
    run_id = known.children[name] = child.info.run_id
    settings = {
        **(metrics.setting.to_json() if metrics.setting else {}),
        "data": {name: data.to_json() for name, data in (metrics.data or {}).items()},
        "environment": metrics.environment,
        "evaluation": to.config.evaluation.model_dump(),
        "tasks": metrics.tasks,
        "position": metrics.position,
    }
    send_params(to, child, flatten(settings))
    send_inputs(to, run_id, metrics)
    send_inputs(to, known.parent_id, metrics)
    row = score_points(metrics)
    model_id = None if metrics.origin else _send_model(known, child, directory, metrics)
    send_metrics(to, run_id, row, model_id, metric_datasets(metrics))
    send_metrics(to, run_id, [*cost_points(metrics), *training_points(metrics.training)])
    send_metrics(to, known.parent_id, row)
    upload_folder(to, run_id, directory, "")
    send_step_table(to, child, metrics)
    to.client.set_terminated(run_id, "FINISHED", milliseconds(metrics.finished))
    if model_id or metrics.origin:
        to.client.set_tag(run_id, PREFIX + "sent", digest)
    known.sent[name] = digest
    return run_id


def _send_model(known: _Known, child, directory: str, metrics: StepRecord) -> str | None:
    """Log a step's model; returns its id, or None if it could not be logged."""
    from pipelines.lineage.logged_models import ModelNotWritten  # imports numpy, which most commands never need

    client, run_id = known.to.client, child.info.run_id
    try:
        model_id = known.models.send(child, directory, metrics)
    except ModelNotWritten as error:
        reason = f"the model of step {metrics.position} ({metrics.label}) could not be logged: {error}"
        known.unlogged[metrics.fingerprint] = reason
        client.set_tag(run_id, PREFIX + "model_error", reason[:TAG_LENGTH])
        return None
    if PREFIX + "model_error" in child.data.tags:
        client.delete_tag(run_id, PREFIX + "model_error")
    return model_id
