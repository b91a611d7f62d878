"""Turns a configuration into steps and score cells, and finds those that a run directory is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipelines.chain.start import file_problems, find_start
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import ClassificationTask, TaskSource
from pipelines.data.held_out import needs_held_out, training_digests, training_view
from pipelines.data.identity import score_identity, step_data_identity
from pipelines.data.samples import questions_of
from pipelines.errors import ConfigError, Problem
from pipelines.preflight.data import check_trial_data, tokenizer_of_chats
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan, base_fingerprint, fingerprint, step_fingerprint
from pipelines.runs.samples import Question
from pipelines.runs.start import Start
from pipelines.runs.step_record import base_directory
from pipelines.search.step_search import settings_found

SettingOf = Callable[[PipelineConfig, int, str, str], PipelineConfig | None]


@dataclass(frozen=True)
class Plan:
    """A configuration turned into steps and score cells.

    Attributes:
        base_directory: the step directory of row 0: the base, or what the chain starts from.
        cell_keys: name of a task or corpus → identity of its score (test digest, metric, how it is scored).
        needed: step directory → names of all cells of that row.
        settings: the configuration that each step is trained with, in order.
        undecided: position of the first step whose setting has not been searched yet; that step and later ones use
            the configuration as it is.
        earlier: tasks learned by the step that the chain starts from; they are scored but not trained.
        questions: the prompts of `evaluation.samples`.
        asked: step directory → keys of the questions that this row answers.
    """

    base_fingerprint: str
    base_directory: str
    steps: tuple[StepPlan, ...]
    cell_keys: dict[str, str]
    needed: dict[str, tuple[str, ...]]
    settings: tuple[PipelineConfig, ...]
    undecided: int | None = None
    start: Start | None = None
    earlier: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    asked: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def decided(self) -> tuple[StepPlan, ...]:
        return self.steps if self.undecided is None else self.steps[: self.undecided - 1]

    def setting(self, step: StepPlan) -> PipelineConfig:
        return self.settings[step.position - 1]

    def learned_at(self) -> dict[str, int]:
        """Task → first row of the score matrix after its training."""
        return dict.fromkeys(self.earlier, 0) | {name: step.position for step in self.steps for name in step.tasks}

    def missing_cells(self, run: RunDirectory) -> dict[str, list[str]]:
        """step directory → cells that have not been scored yet."""
        missing = {}
        for directory in self._rows():
            row = run.metrics(directory)
            keys = {cell.key for cell in row.cells} if row else set()
            missing[directory] = [name for name in self.needed[directory] if self.cell_keys[name] not in keys]
        return missing

    def unanswered(self, run: RunDirectory) -> dict[str, list[str]]:
        """step directory → keys of the questions of `evaluation.samples` that it has not answered yet."""
        if not self.questions:
            return {}
        missing = {}
        for directory in self._rows():
            row = run.metrics(directory)
            known = {sample.key for sample in (row.samples or ())} if row else set()
            missing[directory] = [key for key in self.asked[directory] if key not in known]
        return missing

    def _rows(self) -> list[str]:
        """The step directories whose setting is known, row 0 first."""
        return [self.base_directory, *(step.directory for step in self.decided)]

    def lacks_scores(self, run: RunDirectory) -> bool:
        """Whether a cell or a sample is missing."""
        return any(self.missing_cells(run).values()) or any(self.unanswered(run).values())

    def missing_steps(self, run: RunDirectory) -> list[StepPlan]:
        return [step for step in self.decided if run.metrics(step.directory) is None]


def make_plan(
    config: PipelineConfig, run: RunDirectory | None = None, setting_of: SettingOf = lambda config, *_: config
) -> Plan:
    """The steps with their fingerprints, and the cells that the metrics need.

    Args:
        run: run directory of the chain; it records which step an alias in `start_from` resolved to.
        setting_of: (configuration, position, parent's fingerprint, base's fingerprint) → the configuration that the
            step is trained with; None: a search must find it first.

    Raises:
        ConfigError: this configuration cannot start from `start_from`.
    """
    base = base_fingerprint(config.base_model)
    start = find_start(config, run)
    tokenizer = tokenizer_of_chats(config)
    identities = {task.name: step_data_identity(config, task, tokenizer) for task in config.tasks}
    earlier = tuple(task.name for task in config.tasks if start and _is_known(start, task))
    new = [name for name in identities if name not in earlier]
    if not new:
        reason = f"{start.named} has learned all of them already" if start else "there are none"
        raise ConfigError([Problem("tasks", f"{reason}; add one")])
    parent = start.fingerprint if start else base
    steps: list[StepPlan] = []
    settings: list[PipelineConfig] = []
    undecided = None
    for position, names in enumerate([tuple(new)] if config.is_joint else [(name,) for name in new], 1):
        setting = None if undecided else setting_of(config, position, parent, base)
        if setting is None:
            undecided, setting = undecided or position, config
        identity = step_fingerprint(base, parent, setting, [identities[name] for name in names])
        steps.append(StepPlan(position, names, identity, parent, start.depth if start else 0))
        settings.append(setting)
        parent = steps[-1].fingerprint
    first = f"steps/0-start-{start.fingerprint[:8]}" if start else base_directory(base)
    needed = _needed(config, first, steps, earlier)
    keys, questions = _cell_keys(settings[0]), questions_of(settings[0])
    asked = _asked(config, questions, first, steps, earlier)
    settings = tuple(settings)
    return Plan(base, first, tuple(steps), keys, needed, settings, undecided, start, earlier, questions, asked)


def _is_known(start: Start, task: TaskSource) -> bool:
    """Whether the chain starts from a step that has learned this task, with or without rows held out."""
    return task.name in start.digests and any(start.knows(task.name, digest) for digest in training_digests(task))


def _cell_keys(config: PipelineConfig) -> dict[str, str]:
    return {source.name: fingerprint(score_identity(source, config)) for source in [*config.tasks, *config.retention]}


def _needed(
    config: PipelineConfig, first: str, steps: Sequence[StepPlan], earlier: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The cells to score per step directory.

    Row 0 scores all tasks. Every step scores its own tasks, the next step's tasks and the retention corpora; every
    `evaluation.earlier_every`-th step and the last one also score all tasks learned before. A task with an untrained
    head is not scored.
    """
    names = [task.name for task in config.tasks]
    corpora = tuple(corpus.name for corpus in config.retention)
    scored = tuple(n for n in names if n in earlier or not has_untrained_head(config, n))
    needed, seen = {first: scored + corpora}, set(earlier)
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        seen |= set(step.tasks)
        ahead = [n for n in (after.tasks if after else ()) if not has_untrained_head(config, n)]
        whole = after is None or step.position % config.evaluation.earlier_every == 0
        behind = [n for n in names if n in (seen if whole else step.tasks)]
        needed[step.directory] = (*behind, *ahead, *corpora)
    return needed


def _asked(
    config: PipelineConfig,
    questions: Sequence[Question],
    first: str,
    steps: Sequence[StepPlan],
    earlier: tuple[str, ...],
) -> dict[str, tuple[str, ...]]:
    """The keys of the questions per step directory: all of them, except those of a task with an untrained head."""
    headless = {task.name for task in config.tasks if has_untrained_head(config, task.name)} - set(earlier)
    asked = {}
    for directory, learned in [(first, ()), *((step.directory, step.tasks) for step in steps)]:
        headless -= set(learned)
        asked[directory] = tuple(question.key for question in questions if question.task not in headless)
    return asked


def has_untrained_head(config: PipelineConfig, name: str) -> bool:
    """Whether a task cannot be scored before its own training."""
    task = config.task(name)
    return isinstance(task, ClassificationTask) and task.head == "classifier"


def planned(config: PipelineConfig, run: RunDirectory) -> tuple[PipelineConfig, Plan]:
    """The configuration that the chain is trained with, and the plan with all settings that searches have found."""
    config = training_view(config) if needs_held_out(config) else config
    if not config.search:
        return config, make_plan(config, run)
    plan = make_plan(config, run, settings_found(run))
    if plan.undecided:
        check_trial_data(config)
    return config, plan


def stored_problems(config: PipelineConfig, run: RunDirectory, plan: Plan) -> list[Problem]:
    """Published files (adapter, heads, strategy state) of finished steps or of the start that are damaged or do not
    fit."""
    problems = list(file_problems(config, plan.start)) if plan.start and plan.missing_steps(run) else []
    for step in plan.steps:
        metrics = run.metrics(step.directory)
        for name in run.damaged_files(step.directory, metrics.files or {}) if metrics else ():
            found = "is missing or has another size, though the step is finished"
            remedy = f"restore it, or train the step again: --redo {step.label}"
            problems.append(Problem(f"{step.directory}/{name}", f"{found}; {remedy}"))
    return problems
