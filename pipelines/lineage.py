"""Project a run directory into MLflow: one idempotent function, used live by the driver and by `curlora sync`.

Experiment = sequence, parent run = chain, child run = step. Everything is found by tag, else made, and is sent with
its original timestamps, so sending again doubles nothing. Only `MlflowClient` is used: fluent state is bound to a
thread and a process. MLflow is a projection: when it is away a run loses nothing, `project` raises one `LineageError`.

Conventions a dashboard can rely on, the same for every sequence:

    tags (`curlora.` + …)   kind (chain | step), run, run_uri, base_model, adapter, strategy on every run;
                            tasks, last_step, base_fingerprint, gate, gate_reasons on the parent;
                            step_fingerprint, parent_fingerprint, parent_run (where it grew from another run's step),
                            step_directory, task, tasks, position on a child
    metrics of the parent   score/<task>, for written answers also rouge_l/<task>, token_f1/<task> and
                            exact_match/<task>; for retained text nll/<corpus>, perplexity/<corpus>; step = position in
                            the sequence, 0 = untouched base; average_accuracy, forgetting, …; step = number of steps
    metrics of a child      train/loss, train/learning_rate; step = optimizer step; its own row of scores and its cost
    inputs                  <task>/train and <name>/test with the digest of the run directory
    logged model of a child the adapter (pipelines/logged_models.py), its row of scores by dataset, its parent as input
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.config import PipelineConfig
from pipelines.runs import RunDirectory, fingerprint
from pipelines.store import artifact_root, connect, errors, quiet

PREFIX = "curlora."
METRICS_A_BATCH = 1000
PARAMS_A_BATCH = 100
PARAM_LENGTH = 500  # what every MLflow server accepts; the whole text is in config.yaml
TAG_LENGTH = 5000
CONVENTIONS = 2  # of this module; another number sends finished steps again
DIGEST_LENGTH = 36
INPUT_PAUSES = (0.2, 0.5, 1.0)  # seconds between tries
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

# -- the projection


def project(run: RunDirectory, uri: str, experiment: str, chain: Sequence[str] | None = None) -> dict[str, str]:
    """Bring MLflow up to what the run directory says. Call it as often as you like, also while the run goes on.

    Args:
        run: the run directory.
        uri: MLflow tracking URI.
        experiment: name of the experiment, made if missing.
        chain: step fingerprints of the current plan, in order; default: those of `results.json`, else the chain
            that ends in the step finished last. Older steps of a changed configuration are not part of it.

    Returns:
        step fingerprint → MLflow run id, and `"parent"` → id of the parent run.

    Raises:
        LineageError: MLflow is away or refuses.
    """
    return Projection(run, uri, experiment).send(chain)


class Projection:
    """A run in MLflow, kept up to date by a process that lives with it.

    What it has found or sent it does not look up again, so a step costs the same at the end of a long chain as at its
    beginning. After an error everything is looked up anew.
    """

    def __init__(self, run: RunDirectory, uri: str, experiment: str):
        self.run, self.uri, self.experiment = run, uri, experiment
        self._known: _Known | None = None
        self._last: str | None = None  # fingerprint of the step that was sent last

    def send(self, chain: Sequence[str] | None = None) -> dict[str, str]:
        """What `project` does."""
        with errors(self.uri, f"nothing is lost; send it later with: curlora sync {self.run.uri}"), quiet():
            steps, client = current_steps(self.run, chain), connect(self.uri)
            known, self._known = self._known, None  # should this not come to its end
            known = self._now(known, client, steps) or self._look(client, steps)
            ids = _send(known, steps)
            self._known, self._last = known, steps[-1][1]["fingerprint"] if steps else None
            return ids

    def _now(self, known: _Known | None, client, steps: Steps) -> _Known | None:
        """With the parent run as it is now; None if the run was deleted or these steps are another chain's.

        A step's fingerprint contains its parent's: where the last one is, all before it are.
        """
        if known is None or self._last not in {None, *(metrics["fingerprint"] for _, metrics in steps)}:
            return None
        parent = client.get_run(known.parent_id)
        return replace(known, parent=parent) if parent.info.lifecycle_stage == "active" else None

    def _look(self, client, steps: Steps) -> _Known:
        # Imported here: the kinds of task bring numpy along, which most commands never need.
        from pipelines.logged_models import LoggedModels

        to = _Target(client, _experiment(client, self.uri, self.experiment), self.run, self.run.config())
        parent_id = _parent(to, steps).info.run_id
        children = _children(to, parent_id)
        models = LoggedModels(client, to.experiment_id, parent_id, self.run, to.config)
        ids = {name: child.info.run_id for name, child in children.items()}
        sent = {name: child.data.tags.get(PREFIX + "sent", "") for name, child in children.items()}
        return _Known(to, models, client.get_run(parent_id), ids, sent)


Steps = Sequence[tuple[str, dict]]  # (directory, metrics.json) by position, row 0 first


@dataclass(frozen=True)
class _Target:
    """What every part of one projection needs: where to, and of what."""

    client: Any
    experiment_id: str
    run: RunDirectory
    config: PipelineConfig
    inputs: set[tuple[str, str, str]] = field(default_factory=set)  # (run id, dataset, digest) that are there


@dataclass(frozen=True)
class _Known:
    """What MLflow holds of a chain.

    Attributes:
        parent: the chain's run, as it was before this sending.
        children: step fingerprint → MLflow run id.
        sent: step fingerprint → digest of what was sent of it.
    """

    to: _Target
    models: Any
    parent: Any
    children: dict[str, str]
    sent: dict[str, str]

    @property
    def parent_id(self) -> str:
        return self.parent.info.run_id


def _send(known: _Known, steps: Steps) -> dict[str, str]:
    from pipelines.lineage_search import project_searches  # which uses what is here

    known.models.steps = steps
    ids = {"parent": known.parent_id}
    for directory, metrics in steps:
        if metrics["position"] == 0:
            _send_base(known.to, known.parent, directory, metrics)
        else:
            ids[metrics["fingerprint"]] = _send_step(known, directory, metrics)
    _send_parent(known.to, known.models, known.parent, steps)
    project_searches(known.to, known.parent_id, ids)
    return ids


def current_steps(run: RunDirectory, chain: Sequence[str] | None = None) -> Steps:
    """(directory, metrics.json) of the base and of every finished step of one chain, by position."""
    found = {}
    for entry in run.list("steps"):
        directory = f"steps/{entry}"
        metrics = run.metrics(directory)
        if metrics is not None:
            found[metrics["fingerprint"]] = (directory, metrics)
    results = run.results()
    if chain is None and results is not None:
        chain = [step["fingerprint"] for step in results["steps"]]
    if chain:
        members = [found[name] for name in chain if name in found]
    else:
        members = sorted(found.values(), key=lambda item: item[1]["finished"])[-1:]
    if members:
        members = _ancestors(found, members[0][1]) + members
    if all(metrics["position"] for _, metrics in members):  # a chain that started from another run's adapter
        bases = [item for item in found.values() if item[1]["position"] == 0]
        members += sorted(bases, key=lambda item: item[1]["finished"])[-1:]
    return sorted(members, key=lambda item: item[1]["position"])


def _ancestors(found: Mapping[str, tuple[str, dict]], metrics: dict) -> list[tuple[str, dict]]:
    ancestors = []
    while metrics["parent"] in found:
        ancestors.append(found[metrics["parent"]])
        metrics = ancestors[-1][1]
    return ancestors


def _experiment(client, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        root = artifact_root(uri)
        folder = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        location = f"{root}/{folder}" if root else None
        # The tag makes MLflow's list of experiments open this one on its runs, not as an LLM application.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(name, location, tags=tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # made by another run at this moment
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(
            f"experiment '{name}' is deleted; restore it with `mlflow experiments restore -x "
            f"{experiment.experiment_id}` or set another tracking.experiment"
        )
    return experiment.experiment_id


def search_runs(client, experiments: Sequence[str], tags: Mapping[str, str]) -> list:
    """Every run of these experiments with these tags, whatever the number of pages."""
    where = where_tags(tags)
    runs, token = [], None
    while True:
        page = client.search_runs(list(experiments), where, max_results=1000, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def where_tags(tags: Mapping[str, str]) -> str:
    """MLflow's filter for all of these tags."""
    escaped = {key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in tags.items()}
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in escaped.items())


# -- parent run = chain


def _parent(to: _Target, steps: Steps):
    """The parent run of this chain.

    A fingerprint contains that of its parent step, so the recorded last step belongs to this chain if and only if
    everything before it does: a sequence that grew continues its parent run; one whose past was changed gets a new
    run, and the old one stays as the record of what was.
    """
    tags = {PREFIX + "kind": "chain", PREFIX + "run": to.run.name, PREFIX + "run_uri": identity(to.run)}
    depth = {metrics["fingerprint"]: metrics["position"] for _, metrics in steps}
    candidates = []
    for found in search_runs(to.client, [to.experiment_id], tags):
        last = found.data.tags.get(PREFIX + "last_step")
        if last is None or last in depth:
            candidates.append((depth.get(last, -1), found.info.start_time, found))
    if candidates:
        return max(candidates, key=lambda item: item[:2])[2]
    tags |= {"mlflow.note.content": CHAIN_NOTE, **_common(to.config)}
    return to.client.create_run(to.experiment_id, _milliseconds(_started(to.run, steps)), tags, to.run.name)


def identity(run: RunDirectory) -> str:
    """One spelling of where a run lies, whatever directory the command was called in."""
    return os.path.abspath(run.root) if run.is_local else run.uri


def _common(config: PipelineConfig) -> dict[str, str]:
    """Tags that every run of the chain carries."""
    return {
        "mlflow.source.name": "curlora",
        "mlflow.source.type": "JOB",
        PREFIX + "base_model": config.base_model.path,
        PREFIX + "adapter": config.adapter.type,
        PREFIX + "strategy": config.strategy.name,
    }


def _started(run: RunDirectory, steps: Steps) -> float:
    for _, event in run.events():
        if event["kind"] == "started":
            return event["time"]
    return min((metrics["started"] for _, metrics in steps), default=0.0)


def _ended(run: RunDirectory, steps: Steps) -> float:
    """When the chain came to its end: the last such event, which is among the last files."""
    for name in reversed(run.list("events")):
        event = run.read_json(f"events/{name}")
        if event and event["kind"] in ("finished", "failed"):
            return event["time"]
    return _latest(steps)


def _latest(steps: Steps) -> float:
    """The newest moment of any measurement."""
    moments = [metrics["finished"] for _, metrics in steps]
    moments += [cell["time"] for _, metrics in steps for cell in metrics["cells"]]
    return max(moments, default=0.0)


def _send_parent(to: _Target, models, parent, steps: Steps) -> None:
    """Parameters, aggregates, pages and status of the chain."""
    run, run_id, results = to.run, parent.info.run_id, to.run.results()
    _send_params(to, parent, flatten(to.config.model_dump(exclude={"name", "storage", "tracking"})))
    if results and results["status"] == "finished" and steps:
        moment = _latest(steps)
        aggregates = [(name, results.get(name), moment, steps[-1][1]["position"]) for name in AGGREGATES]
        last = models.found.get(steps[-1][1]["fingerprint"])
        _send_metrics(to, run_id, aggregates, last.model_id if last else None)
    models.link_chain(parent)
    files = ["config.yaml", "results.json", "report.html", *(f"figures/{name}" for name in run.list("figures"))]
    _upload(to, run_id, {name: name for name in files if run.exists(name)})
    tags = {PREFIX + "tasks": ",".join(task.name for task in to.config.tasks)[:TAG_LENGTH]}
    if steps:
        tags[PREFIX + "last_step"] = steps[-1][1]["fingerprint"]
        if not steps[0][1].get("parent_run"):  # row 0 is the base, not another run's step
            tags[PREFIX + "base_fingerprint"] = steps[0][1]["fingerprint"]
    if results and results.get("gate"):
        tags |= gate_tags(results["gate"])
    _set_tags(to, parent, tags)
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(results["status"] if results else "", "RUNNING")
    if status != "RUNNING":
        ended = _milliseconds(_ended(run, steps))
        if (parent.info.status, parent.info.end_time) != (status, ended):
            to.client.set_terminated(run_id, status, ended)
    elif parent.info.status != "RUNNING":
        to.client.update_run(run_id, status)


def gate_tags(verdict: Mapping[str, Any]) -> dict[str, str]:
    """A verdict as tags, in words that a list of runs can be filtered by."""
    word = {True: "passed", False: "refused", None: "undecided"}[verdict["passed"]]
    return {PREFIX + "gate": word, PREFIX + "gate_reasons": "; ".join(verdict["reasons"])[:TAG_LENGTH]}


# -- child run = step


def _children(to: _Target, parent_id: str) -> dict[str, Any]:
    tags = {"mlflow.parentRunId": parent_id, PREFIX + "kind": "step"}
    found = search_runs(to.client, [to.experiment_id], tags)
    return {child.data.tags[PREFIX + "step_fingerprint"]: child for child in found}


def _new_child(to: _Target, parent_id: str, directory: str, metrics: dict):
    label = label_of(metrics)
    tags = {
        "mlflow.parentRunId": parent_id,
        PREFIX + "kind": "step",
        PREFIX + "run": to.run.name,
        PREFIX + "run_uri": identity(to.run),
        PREFIX + "step_fingerprint": metrics["fingerprint"],
        PREFIX + "step_directory": directory,
        PREFIX + "parent_fingerprint": metrics["parent"] or "",
        PREFIX + "task": label,
        PREFIX + "tasks": ",".join(metrics["tasks"])[:TAG_LENGTH],
        PREFIX + "position": str(metrics["position"]),
        **_common(to.config),
    }
    if origin := metrics.get("parent_run"):
        tags[PREFIX + "parent_run"] = origin
    if commit := metrics["environment"].get("git_commit"):
        tags["mlflow.source.git.commit"] = commit
    name = f"{metrics['position']}-{label}"
    return to.client.create_run(to.experiment_id, _milliseconds(metrics["started"]), tags, name)


def label_of(metrics: dict) -> str:
    return metrics["tasks"][0] if len(metrics["tasks"]) == 1 else "joint"


def _send_base(to: _Target, parent, directory: str, metrics: dict) -> None:
    """Row 0 trained nothing, so it is no child: its scores start the parent's curves."""
    run_id, sent = parent.info.run_id, fingerprint([CONVENTIONS, metrics])
    if parent.data.tags.get(PREFIX + "sent_base") == sent:
        return
    _send_metrics(to, run_id, score_points(metrics))
    _send_inputs(to, run_id, metrics)
    _upload_folder(to, run_id, directory, "base")
    to.client.set_tag(run_id, PREFIX + "sent_base", sent)


def _send_step(known: _Known, directory: str, metrics: dict) -> str:
    """Everything of one step; its run's id. The mark `sent` comes last, so that a step is not sent again."""
    to, name, digest = known.to, metrics["fingerprint"], fingerprint([CONVENTIONS, metrics])
    if known.sent.get(name) == digest:
        return known.children[name]
    if name in known.children:
        child = to.client.get_run(known.children[name])
    else:
        child = _new_child(to, known.parent_id, directory, metrics)
    run_id = known.children[name] = child.info.run_id
    settings = {
        **metrics.get("setting", {}),
        "data": metrics.get("data"),
        "environment": metrics["environment"],
        "evaluation": to.config.evaluation.model_dump(),
        "tasks": metrics["tasks"],
        "position": metrics["position"],
    }
    _send_params(to, child, flatten(settings))
    _send_inputs(to, run_id, metrics)
    _send_inputs(to, known.parent_id, metrics)
    row = score_points(metrics)
    _send_metrics(to, run_id, row, known.models.send(child, directory, metrics), _datasets(metrics))
    _send_metrics(to, run_id, [*_cost(metrics), *_curve(metrics)])
    _send_metrics(to, known.parent_id, row)
    _upload_folder(to, run_id, directory, "")
    to.client.set_terminated(run_id, "FINISHED", _milliseconds(metrics["finished"]))
    to.client.set_tag(run_id, PREFIX + "sent", digest)
    known.sent[name] = digest
    return run_id


# -- metrics: (key, value, unix seconds, step)

Point = tuple[str, float | None, float, int]


def score_points(metrics: dict) -> list[Point]:
    """One row of the score matrix; its step is the position in the sequence."""
    points: list[Point] = []
    for cell in newest_cells(metrics):
        name, moment, position = cell["name"], cell["time"], metrics["position"]
        if cell["role"] == "task":
            points.append((f"score/{name}", cell["value"], moment, position))
            for metric, value in cell.get("extras", {}).items():
                points.append((f"{metric}/{name}", value, moment, position))
        else:
            points.append((f"nll/{name}", cell["nll"], moment, position))
            points.append((f"perplexity/{name}", cell["perplexity"], moment, position))
    return points


def newest_cells(metrics: dict) -> list[dict]:
    """One cell a name: a test split that was changed leaves the older cell behind."""
    return list({cell["name"]: cell for cell in sorted(metrics["cells"], key=lambda cell: cell["time"])}.values())


def _cost(metrics: dict) -> list[Point]:
    values = {
        "trainable_parameters": metrics.get("trainable_parameters"),
        "head_parameters": metrics.get("head_parameters"),
        "adapter_bytes": metrics.get("adapter_bytes"),
        "peak_memory_bytes": metrics.get("peak_memory_bytes"),
        "tokens_per_second": metrics.get("training", {}).get("tokens_per_second"),
        "train/final_loss": metrics.get("training", {}).get("final_loss"),
        **{f"seconds/{name}": value for name, value in metrics["seconds"].items()},
    }
    return [(name, value, metrics["finished"], metrics["position"]) for name, value in values.items()]


def _curve(metrics: dict) -> list[Point]:
    points: list[Point] = []
    for step, loss, learning_rate, moment in metrics.get("training", {}).get("curve", []):
        points.append(("train/loss", loss, moment, step))
        points.append(("train/learning_rate", learning_rate, moment, step))
    return points


def finite(value: float | None) -> float | None:
    """What MLflow can store: infinity becomes the largest float, as its server would make it; NaN and None nothing."""
    if value is None or math.isnan(value):
        return None
    return max(-sys.float_info.max, min(sys.float_info.max, float(value)))


def _send_metrics(
    to: _Target,
    run_id: str,
    points: Iterable[Point],
    model_id: str | None = None,
    datasets: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Metrics of a run; of a logged model too, with the (name, digest) of the data that each was measured on."""
    from mlflow.entities import Metric

    of_run = run_id if model_id else None
    metrics = [
        Metric(key, number, _milliseconds(moment), step, model_id, *(datasets or {}).get(key, (None, None)), of_run)
        for key, value, moment, step in points
        if (number := finite(value)) is not None
    ]
    for batch in _batches(metrics, METRICS_A_BATCH):
        to.client.log_batch(run_id, metrics=batch)


def _datasets(metrics: dict) -> dict[str, tuple[str, str]]:
    """Metric → (name, digest) of the test data behind it, as `_send_inputs` names them."""
    digests = {cell["name"]: cell["digest"][:DIGEST_LENGTH] for cell in newest_cells(metrics)}
    names = ((key, key.split("/")[-1]) for key, *_ in score_points(metrics))
    return {key: (f"{name}/test", digests[name]) for key, name in names}


# -- parameters, tags, datasets, artifacts


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as `a.b.0` → text; what is null or empty is left out."""
    if isinstance(value, Mapping):
        items: Iterable = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        items = enumerate(value)
    elif value is None or value == [] or value == ():
        return {}
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        key = re.sub(r"[^A-Za-z0-9_./: -]", "_", prefix)[:250]
        return {key: text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"}
    flat = {}
    for key, item in items:
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _send_params(to: _Target, run, wanted: Mapping[str, str]) -> None:
    """New parameters are logged. MLflow never changes one, so a later value goes to a tag `changed.<name>`."""
    from mlflow.entities import Param

    stored = run.data.params
    missing = [Param(key, value) for key, value in wanted.items() if key not in stored]
    for batch in _batches(missing, PARAMS_A_BATCH):
        to.client.log_batch(run.info.run_id, params=batch)
    changed = {key: value for key, value in wanted.items() if stored.get(key, value) != value}
    _set_tags(to, run, {f"{PREFIX}changed.{key}"[:250]: value for key, value in changed.items()})


def _set_tags(to: _Target, run, wanted: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    tags = [RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value]
    for batch in _batches(tags, PARAMS_A_BATCH):
        to.client.log_batch(run.info.run_id, tags=batch)


def _send_inputs(to: _Target, run_id: str, metrics: dict) -> None:
    """Datasets by our own digest: MLflow's hashes the first 10,000 rows only."""
    sources = {source.name: source.data for source in [*to.config.tasks, *to.config.retention]}
    inputs = []
    for name, splits in metrics.get("data", {}).items():
        for split, data in splits.items():
            context = "training" if split == "train" else split
            inputs.append(_dataset(f"{name}/{split}", data["digest"], data["rows"], sources.get(name), context))
    for cell in metrics["cells"]:
        context = "evaluation" if cell["role"] == "task" else "retention"
        inputs.append(
            _dataset(f"{cell['name']}/test", cell["digest"], cell["count"], sources.get(cell["name"]), context)
        )
    keys = {(run_id, item.dataset.name, item.dataset.digest): item for item in inputs}
    missing = [item for key, item in keys.items() if key not in to.inputs]
    to.inputs.update(keys)
    for batch in _batches(missing, PARAMS_A_BATCH):
        _log_inputs(to, run_id, batch)


def _log_inputs(to: _Target, run_id: str, batch: list) -> None:
    """The server looks for a dataset and then adds it: of two clients with a new one at once, one is turned away.

    The other's dataset is there a moment later, and is found.
    """
    from mlflow.exceptions import MlflowException

    for pause in INPUT_PAUSES:
        try:
            return to.client.log_inputs(run_id, datasets=batch)
        except MlflowException as error:
            if not re.search("unique|duplicate", str(error), re.IGNORECASE):
                raise
            time.sleep(pause)
    to.client.log_inputs(run_id, datasets=batch)


def _dataset(name: str, digest: str, rows: int, source: str | None, context: str):
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name,
        digest=digest[:DIGEST_LENGTH],
        source_type="local" if source and source.startswith("/") else "external",
        source=json.dumps({"uri": source or name}),
        profile=json.dumps({"num_rows": rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _upload_folder(to: _Target, run_id: str, directory: str, target: str) -> None:
    """Files of a step that MLflow lacks or has in another size; what is there already is not sent again."""
    known, root = _known_artifacts(to, run_id, target), to.run.path(directory)
    wanted = {}
    for entry, info in sorted(to.run.fs.find(root, detail=True).items()):
        relative = posixpath.relpath(entry, root)
        place = posixpath.join(target, relative)
        if relative.endswith(".tmp") or relative.startswith("strategy/"):
            continue
        # metrics.json may get later cells, in a text of the same length
        if relative == "metrics.json" or known.get(place) != info["size"]:
            wanted[f"{directory}/{relative}"] = place
    _upload(to, run_id, wanted)


def _known_artifacts(to: _Target, run_id: str, path: str) -> dict[str, int]:
    known, folders = {}, [path]
    while folders:
        for info in to.client.list_artifacts(run_id, folders.pop() or None):
            if info.is_dir:
                folders.append(info.path)
            else:
                known[info.path] = info.file_size
    return known


def _upload(to: _Target, run_id: str, files: Mapping[str, str]) -> None:
    """Files of the run as artifacts (path in the run → artifact path), in one go: one by one takes far longer."""
    if not files:
        return
    with tempfile.TemporaryDirectory() as scratch:
        for source, target in files.items():
            local = Path(scratch) / target
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(to.run.read_bytes(source))
        to.client.log_artifacts(run_id, scratch)


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
