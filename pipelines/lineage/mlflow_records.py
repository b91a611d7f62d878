"""Writes parameters, metrics, tags, datasets and artifacts to MLflow, idempotently."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.paths import looks_local
from pipelines.config.pipeline import PipelineConfig
from pipelines.lineage.limits import as_many_as_fit
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.records import Point, newest_cells, score_points
from pipelines.runs.step_record import StepRecord

PREFIX = "curlora."
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 500  # accepted by every MLflow server; the full text is in config.yaml
TAG_LENGTH = 5000
DIGEST_LENGTH = 36
SCORES = ("metrics.json", "adapter/README.md")  # files of a step that may gain scores without changing their size
PARAMETERS = "parameters.json"  # artifact with all parameters of a run whose server does not take them all
INPUT_PAUSES = (0.2, 0.5, 1.0)  # seconds between retries


@dataclass(frozen=True)
class Target:
    """Source and destination of one projection.

    Attributes:
        inputs: (run id, dataset, digest) of the datasets already logged.
        left_out: run id → number of parameters that the server has refused.
    """

    client: Any
    experiment_id: str
    run: RunDirectory
    config: PipelineConfig
    inputs: set[tuple[str, str, str]] = field(default_factory=set)
    left_out: dict[str, int] = field(default_factory=dict)


def search_runs(client, experiments: Sequence[str], tags: Mapping[str, str]) -> list:
    """Every run of these experiments with these tags, over all result pages."""
    condition = tag_filter(tags)
    runs, token = [], None
    while True:
        page = client.search_runs(list(experiments), condition, max_results=1000, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def tag_filter(tags: Mapping[str, str]) -> str:
    """MLflow filter string that matches all of these tags."""
    escaped = {key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in tags.items()}
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in escaped.items())


def identity(run: RunDirectory) -> str:
    """The location of a run, independent of the current directory."""
    return os.path.abspath(run.root) if run.is_local else run.uri


def common_tags(config: PipelineConfig) -> dict[str, str]:
    """Tags of every run of the chain."""
    return {
        "mlflow.source.name": "curlora",
        "mlflow.source.type": "JOB",
        PREFIX + "base_model": config.base_model.path,
        PREFIX + "adapter": config.adapter.type,
        PREFIX + "strategy": config.strategy.name,
    }


def finite(value: float | None) -> float | None:
    """A value that MLflow can store: infinity becomes the largest float, as on its server; NaN becomes None."""
    if value is None or math.isnan(value):
        return None
    return max(-sys.float_info.max, min(sys.float_info.max, float(value)))


def send_metrics(
    to: Target,
    run_id: str,
    points: Iterable[Point],
    model_id: str | None = None,
    datasets: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Log metrics of a run and, if given, of a logged model, with the (name, digest) of each metric's dataset."""
    from mlflow.entities import Metric  # slow

    of_run = run_id if model_id else None
    metrics = [
        Metric(key, number, milliseconds(moment), step, model_id, *(datasets or {}).get(key, (None, None)), of_run)
        for key, value, moment, step in points
        if (number := finite(value)) is not None
    ]
    _send_all(lambda batch: to.client.log_batch(run_id, metrics=batch), metrics, METRICS_PER_BATCH)


def metric_datasets(metrics: StepRecord) -> dict[str, tuple[str, str]]:
    """Metric → (name, digest) of its test data, named as in `send_inputs`."""
    digests = {cell.name: cell.digest[:DIGEST_LENGTH] for cell in newest_cells(metrics)}
    names = ((key, key.split("/")[-1]) for key, *_ in score_points(metrics))
    return {key: (f"{name}/test", digests[name]) for key, name in names}


# -- parameters, tags, datasets, artifacts
def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and lists as `a.b.0` → text; null and empty values are left out."""
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


def send_params(to: Target, run, wanted: Mapping[str, str]) -> None:
    """Log new parameters, as many as the server takes; all of them go into an artifact where that is not all.

    MLflow's parameters are immutable, so a changed value becomes a tag `changed.<name>`.
    """
    from mlflow.entities import Param  # slow

    stored, run_id = run.data.params, run.info.run_id
    missing = [Param(key, value) for key, value in wanted.items() if key not in stored]
    if missing and run.data.tags.get(PREFIX + "params_left_out") != _left_out(missing, wanted):
        refused = as_many_as_fit(lambda batch: to.client.log_batch(run_id, params=batch), missing, PARAMS_PER_BATCH)
        if refused:
            to.left_out[run_id] = len(refused)
            to.client.log_text(run_id, json.dumps(wanted, indent=1, ensure_ascii=False), PARAMETERS)
            to.client.set_tag(run_id, PREFIX + "params_left_out", _left_out(refused, wanted))
    changed = {key: value for key, value in wanted.items() if stored.get(key, value) != value}
    set_tags(to, run, {f"{PREFIX}changed.{key}"[:250]: value for key, value in changed.items()})


def _left_out(refused: Sequence, wanted: Mapping[str, str]) -> str:
    """Tag of a run whose server does not take all parameters; the same for the same parameters."""
    digest = fingerprint([sorted(param.key for param in refused), dict(wanted)])[:8]
    return f"{len(refused)} of {len(wanted)}, see {PARAMETERS} ({digest})"


def limits_note(to: Target) -> str | None:
    """What to warn of if the server has refused parameters."""
    if not to.left_out:
        return None
    count, runs = sum(to.left_out.values()), len(to.left_out)
    where = "1 run has" if runs == 1 else f"{runs} runs have"
    return (
        f"MLflow: the server takes no more parameters, {where} {count} too many; all of them are in the artifact "
        f"{PARAMETERS} of the run"
    )


def set_tags(to: Target, run, wanted: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag  # slow

    tags = [RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value]
    _send_all(lambda batch: to.client.log_batch(run.info.run_id, tags=batch), tags, PARAMS_PER_BATCH)


def send_inputs(to: Target, run_id: str, metrics: StepRecord) -> None:
    """Log datasets with the run directory's digests; MLflow's own digest covers only the first 10,000 rows."""
    sources = {source.name: source.data for source in [*to.config.tasks, *to.config.corpora]}
    sources |= {benchmark.name: f"{benchmark.suite}:{','.join(benchmark.tasks)}" for benchmark in to.config.benchmarks}
    inputs = []
    for name, data in (metrics.data or {}).items():
        inputs.append(_dataset(f"{name}/train", data.train.digest, data.train.rows, sources.get(name), "training"))
    for cell in metrics.cells:
        context = "evaluation" if cell.role == "task" else "retention"
        inputs.append(_dataset(f"{cell.name}/test", cell.digest, cell.count, sources.get(cell.name), context))
    keys = {(run_id, item.dataset.name, item.dataset.digest): item for item in inputs}
    missing = [item for key, item in keys.items() if key not in to.inputs]
    to.inputs.update(keys)
    _send_all(lambda batch: _log_inputs(to, run_id, batch), missing, PARAMS_PER_BATCH)


def _log_inputs(to: Target, run_id: str, batch: list) -> None:
    """Log datasets, and retry if another client adds the same dataset at the same time.

    MLflow's server looks a dataset up before it inserts it, so one of two concurrent inserts fails; on retry the
    dataset is found.
    """
    from mlflow.exceptions import MlflowException  # slow

    for pause in INPUT_PAUSES:
        try:
            return to.client.log_inputs(run_id, datasets=batch)
        except MlflowException as error:
            if not re.search("unique|duplicate", str(error), re.IGNORECASE):
                raise
            time.sleep(pause)
    to.client.log_inputs(run_id, datasets=batch)


def dataset_source(data: str | None) -> tuple[str, dict]:
    """Type and fields of a `data:`, from which `mlflow.data.get_source` makes a source that can be loaded.

    MLflow names a source by the scheme of its URI. It has none for a benchmark (`suite:task`) or an unknown scheme;
    such a dataset is a record alone.
    """
    if data is None:  # of a step whose configuration no longer names the task
        return "unknown", {}
    if looks_local(data) or data.startswith("file://"):
        return "local", {"uri": data}
    if data.startswith(("http://", "https://")):
        return "http", {"url": data}
    scheme, separator, _ = data.partition(":")
    return (scheme, {"uri": data}) if separator else ("hugging_face", {"path": data})


def _dataset(name: str, digest: str, rows: int, source: str | None, context: str):
    from mlflow.entities import Dataset, DatasetInput, InputTag  # slow

    source_type, fields = dataset_source(source)
    dataset = Dataset(
        name=name,
        digest=digest[:DIGEST_LENGTH],
        source_type=source_type,
        source=json.dumps(fields),
        profile=json.dumps({"num_rows": rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def upload_folder(to: Target, run_id: str, directory: str, target: str) -> None:
    """Upload the files of a step that MLflow lacks or has with another size."""
    known, root = _known_artifacts(to, run_id, target), to.run.path(directory)
    wanted = {}
    for entry, info in sorted(to.run.fs.find(root, detail=True).items()):
        relative = posixpath.relpath(entry, root)
        artifact = posixpath.join(target, relative)
        if relative.endswith(".tmp") or relative.startswith("strategy/"):
            continue
        if relative in SCORES or known.get(artifact) != info["size"]:
            wanted[f"{directory}/{relative}"] = artifact
    upload_files(to, run_id, wanted)


def _known_artifacts(to: Target, run_id: str, path: str) -> dict[str, int]:
    known, folders = {}, [path]
    while folders:
        for info in to.client.list_artifacts(run_id, folders.pop() or None):
            if info.is_dir:
                folders.append(info.path)
            else:
                known[info.path] = info.file_size
    return known


def upload_files(to: Target, run_id: str, files: Mapping[str, str]) -> None:
    """Upload files of the run (path in the run → artifact path) in one call; one call per file takes far longer."""
    if not files:
        return
    with tempfile.TemporaryDirectory() as scratch:
        for source, target in files.items():
            local = Path(scratch) / target
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(to.run.read_bytes(source))
        to.client.log_artifacts(run_id, scratch)


def _send_all(send: Callable[[Sequence], object], items: Sequence, most: int) -> None:
    """Send items in batches, smaller ones where the server refuses them.

    Raises:
        MlflowException: the server refuses an item alone.
    """
    for item in as_many_as_fit(send, items, most):
        send([item])  # raises what it was refused with


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
