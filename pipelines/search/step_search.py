"""The search before one step: its folder, the identity of its request, and its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search_space import with_values
from pipelines.data.held_out import trial_view
from pipelines.data.identity import score_identity, step_data_identity
from pipelines.preflight.data import tokenizer_of_chats
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, fingerprint, step_fingerprint
from pipelines.runs.results import SearchSummary
from pipelines.runs.step_record import Seconds, TrainedStep, step_label
from pipelines.search.trial_spec import copy_step


@dataclass(frozen=True)
class StepSearch:
    """The search before one step.

    Attributes:
        config: the chain's configuration, without the rows held out for validation.
        parent, base: fingerprints of what the step starts from and of the base model.
        trial_config: `config`, scored on validation data.
        names: tasks and corpora that every trial is scored on.
        cell_keys: name → identity of its score.
        identities: of the training data, as they enter the step's fingerprint.
        folder: relative to the run; depends on everything that affects a trial's objective, not on which trials run.
    """

    config: PipelineConfig
    position: int
    tasks: tuple[str, ...]
    parent: str
    base: str
    trial_config: PipelineConfig
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
            step_fingerprint(self.base, self.parent, self.trial_config, self.identities),
            [self.cell_keys[name] for name in self.names],
            search.objective.model_dump(),
            search.trial_training,
        ]
        return f"search/{self.position}-{self.label}-{fingerprint(identity)[:8]}"

    @property
    def request(self) -> str:
        """Fingerprint of the search settings; a search is done if its results carry the same one."""
        settings = self.config.search.model_dump(exclude={"when", "max_concurrent", "time_budget"})
        return fingerprint([self.folder, settings])

    def found(self, run: RunDirectory) -> dict | None:
        """The results of the search; None if it is not done."""
        results = run.read_json(f"{self.folder}/results.json")
        return results if results and results["request"] == self.request else None


def search_of_step(config: PipelineConfig, position: int, parent: str, base: str) -> StepSearch:
    """The search before the step at `position`, which starts from the fingerprint `parent`."""
    trial_config = trial_view(config, position)
    new = tuple(t.name for t in config.tasks) if config.is_joint else (config.tasks[position - 1].name,)
    fresh = config.adapter.carry == "fresh"  # earlier tasks keep adapters of their own
    earlier = () if fresh or not config.search.objective.retention_weight else config.tasks[: position - 1]
    names = (*new, *(t.name for t in earlier if t.name not in new), *(c.name for c in trial_config.retention))
    sources = {source.name: source for source in [*trial_config.tasks, *trial_config.retention]}
    keys = {name: fingerprint(score_identity(sources[name], trial_config)) for name in names}
    tokenizer = tokenizer_of_chats(config)
    identities = [step_data_identity(config, config.task(name), tokenizer) for name in new]
    return StepSearch(config, position, new, parent, base, trial_config, names, keys, identities)


def settings_found(run: RunDirectory) -> Callable[[PipelineConfig, int, str, str], PipelineConfig | None]:
    """A `setting_of` for `make_plan`: returns None for a step whose setting has not been searched yet."""
    first: list[PipelineConfig | None] = []

    def setting_of(config: PipelineConfig, position: int, parent: str, base: str) -> PipelineConfig | None:
        when = config.search.when if config.search else None
        if when is None:
            return config
        if when == "first" and position > 1:
            return first[0]
        results = search_of_step(config, position, parent, base).found(run)
        setting = with_values(config, results["chosen"]["values"]) if results else None
        first.append(setting)
        return setting

    return setting_of


def summaries(
    config: PipelineConfig, run: RunDirectory, steps: Sequence[StepPlan], base: str
) -> tuple[SearchSummary, ...]:
    """The `searches` of results.json: the setting chosen before each step, and why."""
    if not config.search or not config.search.when:
        return ()
    found = []
    for step in steps[:1] if config.search.when == "first" else steps:
        target = search_of_step(config, step.position, step.parent, base)
        if results := target.found(run):
            summary = SearchSummary(
                **{key: results[key] for key in ("task", "position", "why", "rule", "pareto", "steps")},
                values=results["chosen"]["values"],
                directory=target.folder,
                trials=len(results["trials"]),
                adopted=results["chosen"]["fingerprint"] == step.fingerprint,
                until=len(steps) if config.search.when == "first" else step.position,
            )
            found.append(summary)
    return tuple(found)


def adopt(run: RunDirectory, target: StepSearch, step: StepPlan) -> bool:
    """Copy the winning trial's adapter into the chain if the trial trained exactly this step; whether it did."""
    chosen = target.found(run)["chosen"]
    if chosen["fingerprint"] != step.fingerprint or run.metrics(step.directory):
        return False
    trial = RunDirectory(f"{run.uri}/{target.folder}/trials/{fingerprint(chosen['values'])[:8]}")
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
