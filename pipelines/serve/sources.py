"""Where an adapter comes from: a step of a run directory or, where that is gone, the copy that MLflow keeps."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import RunDirectoryError
from pipelines.lineage.logged_models import learned_tasks
from pipelines.lineage.registry import Version
from pipelines.lineage.store import connect, errors, quiet
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import choose_step
from pipelines.serve.contract import AdapterError


@dataclass(frozen=True)
class Step:
    """A finished step of a run.

    Attributes:
        version: the registered version that it is; None for a step that is named directly.
        tracking: MLflow store of the version.
    """

    run_uri: str
    directory: str
    fingerprint: str
    version: Version | None = None
    tracking: str | None = None

    @property
    def label(self) -> str:
        """`models:/name/3`, or `run/step`."""
        if self.version:
            return self.version.uri
        step = self.directory.split("/")[-1].split("-", 1)[1].rsplit("-", 1)[0]
        return f"{posixpath.basename(self.run_uri.rstrip('/'))}/{step}"


@dataclass(frozen=True)
class Fetched:
    """A step's files on this machine.

    Attributes:
        folder: with `adapter/` and `heads.safetensors`, as far as the step has them.
        config: of its run; its tasks are those that the step and its ancestors learned, then the run's others.
        tasks: names of the learned ones.
    """

    folder: Path
    config: PipelineConfig
    tasks: frozenset[str]
    base_fingerprint: str


def step_of_run(run: RunDirectory, name: str | None) -> Step:
    """A step by task name, position or fingerprint; None: the last one.

    Raises:
        ConfigError: there is no such step, or it is not finished.
    """
    directory = choose_step(run, name)
    return Step(run.uri, directory, run.metrics(directory).fingerprint)


def step_of_version(version: Version, tracking: str) -> Step:
    return Step(version.run_uri, version.step_directory, version.step_fingerprint, version, tracking)


def fetch(step: Step, scratch: Path) -> Fetched:
    """The step's files, copied to `scratch` unless they are on this machine.

    Raises:
        AdapterError: they are gone or damaged.
        LineageError: only MLflow has them, and it cannot be reached.
    """
    try:
        run = RunDirectory(step.run_uri)
        metrics = run.metrics(step.directory)
    except (OSError, ImportError) as error:  # ImportError: the driver of its storage is not installed here
        run, metrics, reason = None, None, str(error)
    else:
        reason = f"{step.run_uri}/{step.directory} is gone"
    if metrics is None:
        if step.version is None:
            raise AdapterError(reason)
        return _from_mlflow(step, scratch)
    if damaged := run.damaged_files(step.directory, metrics.files or {}):
        raise AdapterError(f"{step.run_uri}/{step.directory}/{damaged[0]} is missing or damaged")
    config, results = run.config(), run.results()
    learned = learned_tasks(_links(run, step.directory))
    names = frozenset(task.name for task in learned)
    others = [task for task in config.tasks if task.name not in names]
    config = config.model_copy(update={"tasks": [*learned, *others]})
    return Fetched(run.download(step.directory, scratch), config, names, results.base_fingerprint)


def _links(run: RunDirectory, directory: str) -> list:
    """(configuration, metrics.json) of the step and its ancestors, oldest first, as far as they exist."""
    found = []
    try:
        for owner, _, metrics in run.ancestors(directory):
            if metrics.position and metrics.fingerprint not in {known.fingerprint for _, known in found}:
                found.append((owner.config(), metrics))
    except RunDirectoryError:  # the run that it started from is gone; what it learned there cannot be asked for
        pass
    return found[::-1]


def _from_mlflow(step: Step, scratch: Path) -> Fetched:
    import mlflow.artifacts  # slow

    remedy = f"{step.run_uri} cannot be read either"
    with errors(step.tracking, remedy), quiet():
        kept = connect(step.tracking).get_model_version_download_uri(step.version.name, str(step.version.version))
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=kept, dst_path=str(scratch), tracking_uri=step.tracking
        )
    inner = Path(folder) / "artifacts" / "step"
    try:
        config = PipelineConfig.model_validate(json.loads((inner / "config.json").read_text(encoding="utf-8")))
        facts = json.loads((inner / "model.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{step.run_uri} is gone, and MLflow's copy of {step.label} is incomplete") from error
    return Fetched(inner, config, frozenset(facts["tasks"]), facts["base_fingerprint"])
