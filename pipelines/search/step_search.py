"""The search before one step: where it lies, what it asked for, what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search_space import with_values
from pipelines.data.held_out import trial_view
from pipelines.data.identity import data_identity, score_identity
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, fingerprint, step_fingerprint
from pipelines.runs.results import SearchSummary
from pipelines.runs.step_record import Seconds, TrainedStep, step_label
from pipelines.search.trial_spec import copy_step


@dataclass(frozen=True)
class StepSearch:
    """The search before one step.

    Attributes:
        folder: below the run; named by everything that a trial's worth depends on, not by which trials there are.
    """

    config: PipelineConfig  # training view
    position: int
    tasks: tuple[str, ...]
    parent: str
    base: str
    judged: PipelineConfig
    names: tuple[str, ...]
    cell_keys: dict[str, str]
    identities: list[dict] = field(repr=False)

    @property
    def label(self) -> str:
        return step_label(self.tasks)

    @property
    def folder(self) -> str:
        search = self.config.search
        identity = [
            step_fingerprint(self.base, self.parent, self.judged, self.identities),
            [self.cell_keys[name] for name in self.names],
            search.objective.model_dump(),
            search.trial_training,
        ]
        return f"search/{self.position}-{self.label}-{fingerprint(identity)[:8]}"

    @property
    def request(self) -> str:
        """Identity of what was asked for: a search is done if it has answered this."""
        how = self.config.search.model_dump(exclude={"when", "max_concurrent", "time_budget"})
        return fingerprint([self.folder, how])

    def found(self, run: RunDirectory) -> dict | None:
        """The results of the search, if it is done."""
        results = run.read_json(f"{self.folder}/results.json")
        return results if results and results["request"] == self.request else None


def search_before(config: PipelineConfig, position: int, parent: str, base: str) -> StepSearch:
    judged = trial_view(config, position)
    new = tuple(t.name for t in config.tasks) if config.is_joint else (config.tasks[position - 1].name,)
    fresh = config.adapter.carry == "fresh"  # earlier tasks keep adapters of their own
    earlier = () if fresh or not config.search.objective.retention_weight else config.tasks[: position - 1]
    names = (*new, *(t.name for t in earlier if t.name not in new), *(c.name for c in judged.retention))
    sources = {source.name: source for source in [*judged.tasks, *judged.retention]}
    keys = {name: fingerprint(score_identity(sources[name], judged)) for name in names}
    identities = [data_identity(config.task(name)) for name in new]
    return StepSearch(config, position, new, parent, base, judged, names, keys, identities)


def settings_found(run: RunDirectory) -> Callable[[PipelineConfig, int, str, str], PipelineConfig | None]:
    """For `make_plan`: the setting of a step; None if a search has to find it first."""

    first: list[PipelineConfig | None] = []

    def setting_of(config: PipelineConfig, position: int, parent: str, base: str) -> PipelineConfig | None:
        when = config.search.when if config.search else None
        if when is None:
            return config
        if when == "first" and position > 1:
            return first[0]
        results = search_before(config, position, parent, base).found(run)
        setting = with_values(config, results["chosen"]["values"]) if results else None
        first.append(setting)
        return setting

    return setting_of


def summaries(
    config: PipelineConfig, run: RunDirectory, steps: Sequence[StepPlan], base: str
) -> tuple[SearchSummary, ...]:
    """For results.json: what was chosen before which step, and why."""
    if not config.search or not config.search.when:
        return ()
    found = []
    for step in steps[:1] if config.search.when == "first" else steps:
        where = search_before(config, step.position, step.parent, base)
        if results := where.found(run):
            summary = SearchSummary(
                **{key: results[key] for key in ("task", "position", "why", "rule", "pareto", "steps")},
                values=results["chosen"]["values"],
                directory=where.folder,
                trials=len(results["trials"]),
                adopted=results["chosen"]["fingerprint"] == step.fingerprint,
                until=len(steps) if config.search.when == "first" else step.position,
            )
            found.append(summary)
    return tuple(found)


def adopt(run: RunDirectory, where: StepSearch, step: StepPlan) -> bool:
    """Take over what the winning trial has trained, if that is this very step at full length."""
    chosen = where.found(run)["chosen"]
    if chosen["fingerprint"] != step.fingerprint or run.metrics(step.directory):
        return False
    trial = RunDirectory(f"{run.uri}/{where.folder}/trials/{fingerprint(chosen['values'])[:8]}")
    metrics = trial.metrics(chosen["directory"])
    copy_step(trial, chosen["directory"], run, step.directory)
    trained = TrainedStep(
        trainable_parameters=metrics.trainable_parameters,
        head_parameters=metrics.head_parameters,
        adapter_bytes=metrics.adapter_bytes,
        files=metrics.files,
        training=metrics.training,
        started=metrics.started,
        seconds=Seconds(train=metrics.seconds.train, total=metrics.seconds.train),
    )
    run.write_json(f"{step.directory}/trained.json", trained)
    run.event("adopted", fingerprint=step.fingerprint, task=step.label, position=step.position, trial=trial.name)
    return True
