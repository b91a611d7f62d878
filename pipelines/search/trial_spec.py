"""The specification that all trials of a search share."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search_space import Values, with_values
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, fingerprint, step_fingerprint
from pipelines.runs.step_record import StepRecord, step_label
from pipelines.search.objective import Assessment, assess
from pipelines.workers.assignment import Assignment, RungScores

COPIED = ("adapter/", "bank/", "heads.safetensors", "strategy/")  # the files of a step that the next step starts from


@dataclass(frozen=True)
class Spec:
    """The specification that all trials of a search share.

    Attributes:
        config: the chain's configuration, scored on validation data.
        uri: the search's folder.
        parent: fingerprint of what the step starts from; `parent_files` is its (run URI, step directory).
        identities: of the training data, as they enter the step's fingerprint.
        names: tasks and corpora that a trial is scored on.
        cell_keys: name → identity of its score, before the setting's own part.
        weight: weight of the retention loss in the objective.
        trial_training: training fields that shorten a trial.
        reference: name → loss before the trial, for earlier tasks and retained text.
        rungs: fractions of the training at which a trial is scored.
        comparable_train_loss: no setting tried changes the training rows or the training objective.
        reduction: ASHA's reduction factor.
        lease, lease_uri: token of the driver's lease, and the run that it is held on.
    """

    config: PipelineConfig
    uri: str
    position: int
    tasks: tuple[str, ...]
    parent: str
    parent_files: tuple[str, str] | None
    base_fingerprint: str
    base_directory: str
    identities: list[dict]
    names: tuple[str, ...]
    cell_keys: dict[str, str]
    weight: float
    trial_training: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    rungs: tuple[float, ...] = ()
    comparable_train_loss: bool = True
    reduction: int = 1
    lease: str = ""
    lease_uri: str = ""

    @property
    def label(self) -> str:
        return step_label(self.tasks)

    def run(self, values: Values) -> RunDirectory:
        """The run directory of the trial of these values."""
        return RunDirectory(f"{self.uri}/trials/{fingerprint(values)[:8]}")

    def setting(self, values: Values) -> PipelineConfig:
        """The configuration of the trial of these values."""
        shortened = {f"training.{key}": value for key, value in self.trial_training.items()}
        config = with_values(self.config, {**shortened, **values})
        return config.model_copy(update={"name": self.run(values).name, "storage": f"{self.uri}/trials"})

    def step(self, values: Values) -> StepPlan:
        """The step that a trial trains; the chain's step has the same fingerprint if its training is identical."""
        name = step_fingerprint(self.base_fingerprint, self.parent, self.setting(values), self.identities)
        return StepPlan(self.position, self.tasks, name, self.parent)

    def keys(self, config: PipelineConfig) -> dict[str, str]:
        return {name: fingerprint([key, config.training.max_length]) for name, key in self.cell_keys.items()}

    def assess(self, scored: RungScores | StepRecord) -> Assessment | None:
        """Assess a trial by its scores at a rung or at its end; None if a score is not finite."""
        at_rung = self.comparable_train_loss and isinstance(scored, RungScores)
        train_loss = scored.train_loss if at_rung else None
        return assess(scored.cells, self.tasks, self.reference, self.weight, train_loss)

    def assignment(
        self, run: RunDirectory, config: PipelineConfig, steps: Sequence[StepPlan], missing: dict
    ) -> Assignment:
        """An assignment for a worker group."""
        return Assignment(
            run_uri=run.uri,
            config=config.model_dump(),
            steps=tuple(steps),
            base_directory=self.base_directory,
            base_fingerprint=self.base_fingerprint,
            missing=missing,
            cell_keys=self.keys(config),
            lease=self.lease,
            lease_uri=self.lease_uri,
        )

    def copy_parent(self, run: RunDirectory) -> None:
        """Copy the parent step's files, without its scores, into the run directory of a trial."""
        if self.parent_files is None or run.metrics(self.parent_files[1]):
            return
        uri, directory = self.parent_files
        source = RunDirectory(uri)
        copy_step(source, directory, run, directory)
        run.write_json(f"{directory}/metrics.json", replace(source.metrics(directory), cells=()))


def copy_step(source: RunDirectory, directory: str, target: RunDirectory, to: str) -> None:
    """Copy what a step trained (adapter, heads, strategy state), without its scores."""
    for path in source.fs.find(source.path(directory)):
        name = posixpath.relpath(path, source.path(directory))
        if name.startswith(COPIED) and not name.endswith(".tmp"):
            target.write_bytes(f"{to}/{name}", source.read_bytes(f"{directory}/{name}"))
