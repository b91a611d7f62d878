"""The ancestry of an adapter: base → step → step, with data, settings and scores; from run directories or MLflow.

Both sources give the same `Ancestry`: a step's child run in MLflow holds the facts of its run directory as tags,
parameters and metrics (see pipelines/lineage/projection.py). If a chain started from another run's adapter, its
ancestry continues in that run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError, Problem
from pipelines.lineage.mlflow_records import PREFIX, finite, flatten, identity, search_runs
from pipelines.lineage.store import connect, errors, quiet
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import Point, choose_step, score_points
from pipelines.runs.step_record import StepRecord, base_directory

SETTINGS = ("adapter", "strategy", "training")
NOT_SCORES = (
    "train/",
    "validation/",
    "system/",
    "seconds/",
)  # metrics of a child run that contain a slash but are no scores
MODELS = "models:/"


@dataclass(frozen=True)
class Link:
    """The base (position 0) or one adapter.

    Attributes:
        position: index in its own run's sequence.
        parent: fingerprint of its parent; None for the base.
        run_uri, step_directory: location of its files; for the base, of the run that evaluated it.
        data: task → {"digest", "rows", "used"} of its training data; `used` rows of it were trained on.
        settings: adapter, strategy and training, as dotted name → text.
        scores: metric → value after this step, named as in MLflow.
        finished: Unix time in seconds, to the millisecond.
        origin: folder or hub id that an adapter was imported from; None for one that was trained here.
    """

    position: int
    label: str
    fingerprint: str
    parent: str | None
    run_uri: str
    step_directory: str
    tasks: tuple[str, ...]
    data: dict[str, dict]
    settings: dict[str, str]
    scores: dict[str, float]
    finished: float
    origin: str | None = None

    @property
    def title(self) -> str:
        return "base" if self.is_base else f"{self.position} {self.label}"

    @property
    def is_base(self) -> bool:
        return self.parent is None


@dataclass(frozen=True)
class Ancestry:
    """From the base to one adapter."""

    base_model: str
    links: tuple[Link, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that was learned, in order, each once."""
        return tuple(dict.fromkeys(task for link in self.links for task in link.tasks))

    @property
    def digests(self) -> dict[str, str]:
        """Task → digest of its most recent training data."""
        return {task: data["digest"] for link in self.links for task, data in link.data.items()}

    def to_json(self) -> dict:
        return {"base_model": self.base_model, "links": [asdict(link) for link in self.links]}


def find(adapter: str, storage: str = "./runs", uri: str | None = None) -> Ancestry:
    """The ancestry of `RUN`, `RUN/STEP` (task, position or fingerprint), a step's folder, or `models:/NAME@ALIAS`.

    Args:
        storage: folder of a run that is given by its name.
        uri: MLflow store of a `models:/` name.

    Raises:
        ConfigError: there is no such adapter.
        RunDirectoryError: an ancestor's files are gone.
        LineageError: MLflow cannot be reached.
    """
    if adapter.startswith(MODELS):
        return from_mlflow(uri or "sqlite:///mlflow.db", adapter)
    run, step = _run_and_step(adapter, storage)
    return from_run(run, choose_step(run, step))


def _run_and_step(adapter: str, storage: str) -> tuple[RunDirectory, str | None]:
    """The run and the step that a path or a name refers to."""
    path = adapter.rstrip("/")
    for candidate in (path, f"{storage}/{path}"):
        for run_uri, step in ((candidate, None), *_splits(candidate)):
            run = RunDirectory(identity(RunDirectory(run_uri)))
            if run.exists("config.yaml"):
                return run, step
    remedy = "give a run, run/step, a step's folder, or models:/name@champion"
    raise ConfigError([Problem(adapter, f"is no adapter, neither as a path nor below {storage}; {remedy}")])


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """`run/step` and `run/steps/3-name-1a2b3c4d[/adapter]` as (run, step)."""
    parent, _, last = path.rpartition("/")
    yield parent or ".", last
    before, found, rest = path.partition("/steps/")
    if found:
        yield before, rest.split("/")[0].split("-")[-1]


# -- from run directories
def from_run(run: RunDirectory, directory: str) -> Ancestry:
    """The ancestry of a finished step, across the runs that its chain started from.

    Raises:
        RunDirectoryError: an ancestor's files are gone.
    """
    links = [_link_of_step(*found) for found in run.ancestors(directory)]
    return Ancestry(run.config().base_model.path, tuple(reversed(links)))


def _link_of_step(run: RunDirectory, directory: str, metrics: StepRecord) -> Link:
    return Link(
        position=metrics.position,
        label=metrics.label,
        fingerprint=metrics.fingerprint,
        parent=metrics.parent,
        run_uri=identity(run),
        step_directory=directory,
        tasks=metrics.tasks,
        data=training_data(metrics),
        settings=flatten({name: getattr(metrics.setting, name) for name in SETTINGS} if metrics.setting else {}),
        scores=_scores(score_points(metrics)),
        finished=round(metrics.finished, 3),
        origin=metrics.origin,
    )


def training_data(metrics: StepRecord) -> dict[str, dict]:
    """`Link.data` of a step."""
    at_most = metrics.setting.training.get("max_train_examples") if metrics.setting else None
    splits = {name: data.train for name, data in (metrics.data or {}).items()}
    return {name: train.to_json() | {"used": _used_rows(train.rows, at_most)} for name, train in splits.items()}


def _used_rows(rows: int, at_most: int | None) -> int:
    """Rows of a training split that a step trains on, under `training.max_train_examples`."""
    return rows if at_most is None else min(rows, at_most)


def rows_in_words(data: Mapping[str, Any]) -> str:
    """The rows of an entry of `Link.data`: `20,000 rows`, or `160 of 20,000 rows`."""
    part = f"{data['used']:,} of " if data["used"] < data["rows"] else ""
    return f"{part}{data['rows']:,} rows"


def _scores(points: Sequence[Point]) -> dict[str, float]:
    return {key: number for key, value, _, _ in sorted(points) if (number := finite(value)) is not None}


# -- from MLflow
def from_mlflow(uri: str, model_uri: str) -> Ancestry:
    """The ancestry of a registered version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`, from MLflow alone.

    Raises:
        ConfigError: there is no such version, or the run of an ancestor was deleted.
        LineageError: MLflow cannot be reached or returns an error.
    """
    with errors(uri, "check --uri"), quiet():
        client = connect(uri)
        version = _version(client, model_uri)
        if version is None:
            raise ConfigError([Problem(model_uri, f"is no registered version in {uri}; see curlora ui")])
        run = client.get_run(version.run_id)
        base_model = _tag(run, "base_model")
        siblings = _siblings(client, run)
        links = [_link_of_run(run)]
        while (origin := _tag(run, "parent_run")) or _tag(run, "parent_fingerprint") != siblings.base:
            parent = _tag(run, "parent_fingerprint")
            found = _step_of_other_run(client, origin, parent) if origin else siblings.steps.get(parent)
            if found is None:
                raise ConfigError([Problem(model_uri, f"its ancestor, step {parent}, has no run in MLflow")])
            siblings = _siblings(client, found) if origin else siblings
            run = found
            links.append(_link_of_run(run))
        links.append(_base_link(client, siblings.chain))
        return Ancestry(base_model, tuple(reversed(links)))


def _tag(run, name: str) -> str | None:
    return run.data.tags.get(PREFIX + name)


def _version(client, model_uri: str):
    from mlflow.exceptions import MlflowException  # slow

    name, at, alias = model_uri.removeprefix(MODELS).partition("@")
    if not at:
        name, _, number = name.rpartition("/")
    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


@dataclass(frozen=True)
class _Siblings:
    """A chain's parent run, its steps by fingerprint, and the fingerprint of its base."""

    chain: Any
    steps: Mapping[str, Any]
    base: str


def _siblings(client, run) -> _Siblings:
    chain = client.get_run(run.data.tags["mlflow.parentRunId"])
    tags = {"mlflow.parentRunId": chain.info.run_id, PREFIX + "kind": "step"}
    found = search_runs(client, [run.info.experiment_id], tags)
    steps = {step.data.tags[PREFIX + "step_fingerprint"]: step for step in found}
    return _Siblings(chain, steps, chain.data.tags.get(PREFIX + "base_fingerprint", ""))


def _step_of_other_run(client, run_uri: str, fingerprint: str):
    """A step of another run, in any experiment."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    tags = {PREFIX + "kind": "step", PREFIX + "run_uri": run_uri, PREFIX + "step_fingerprint": fingerprint}
    return next(iter(search_runs(client, experiments, tags)), None)


def _link_of_run(run) -> Link:
    tags, params = run.data.tags, run.data.params
    tasks = tuple(tags[PREFIX + "tasks"].split(","))
    at_most = int(params["training.max_train_examples"]) if "training.max_train_examples" in params else None
    trained = [task for task in tasks if f"data.{task}.train.digest" in params]  # not those of an imported adapter
    splits = {task: (params[f"data.{task}.train.digest"], int(params[f"data.{task}.train.rows"])) for task in trained}
    return Link(
        position=int(tags[PREFIX + "position"]),
        label=tags[PREFIX + "task"],
        fingerprint=tags[PREFIX + "step_fingerprint"],
        parent=tags[PREFIX + "parent_fingerprint"],
        run_uri=tags[PREFIX + "run_uri"],
        step_directory=tags[PREFIX + "step_directory"],
        tasks=tasks,
        data={
            task: {"digest": digest, "rows": rows, "used": _used_rows(rows, at_most)}
            for task, (digest, rows) in splits.items()
        },
        settings={key: value for key, value in params.items() if key.split(".")[0] in SETTINGS},
        scores={k: v for k, v in sorted(run.data.metrics.items()) if "/" in k and not k.startswith(NOT_SCORES)},
        finished=run.info.end_time / 1000,
        origin=tags.get(PREFIX + "origin"),
    )


def _base_link(client, chain) -> Link:
    """The base has no MLflow run of its own; the chain's artifacts hold its scores."""
    with tempfile.TemporaryDirectory() as scratch:
        path = client.download_artifacts(chain.info.run_id, "base/metrics.json", scratch)
        metrics = StepRecord.from_json(json.loads(Path(path).read_text()))
    return Link(
        position=0,
        label="base",
        fingerprint=metrics.fingerprint,
        parent=None,
        run_uri=chain.data.tags[PREFIX + "run_uri"],
        step_directory=base_directory(metrics.fingerprint),
        tasks=(),
        data={},
        settings={},
        scores=_scores(score_points(metrics)),
        finished=round(metrics.finished, 3),
    )


# -- as text
def as_text(ancestry: Ancestry) -> str:
    """The chain from the base down, one paragraph per adapter; settings only where they change."""
    lines = [f"base  {ancestry.base_model}", f"      fingerprint {ancestry.links[0].fingerprint}"]
    lines += _score_lines(ancestry.links[0])
    before: Mapping[str, str] = {}
    for above, link in zip(ancestry.links, ancestry.links[1:], strict=False):
        lines += ["  ↓", f"{link.title}", f"      fingerprint {link.fingerprint}"]
        if link.run_uri != above.run_uri:
            lines.append(f"      run {link.run_uri}")
        if link.origin:
            lines.append(f"      imported from {link.origin}")
        for task, data in link.data.items():
            lines.append(f"      trained on {task}: {rows_in_words(data)}, digest {data['digest']}")
        changed = {key: value for key, value in link.settings.items() if before.get(key) != value}
        if changed:
            word = "now " if before else ""
            lines.append(f"      {word}" + ", ".join(f"{key} {value}" for key, value in changed.items()))
        lines += _score_lines(link)
        before = link.settings
    return "\n".join(lines)


def _score_lines(link: Link) -> list[str]:
    numbers = ", ".join(f"{key} {_number(value)}" for key, value in link.scores.items())
    return [f"      {numbers}"] if numbers else []


def _number(value: float) -> str:
    return f"{value:.4g}" if math.fabs(value) < 1000 else f"{value:,.0f}"
