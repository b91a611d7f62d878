"""Why each step of a plan will be trained: which field differs from what the run directory recorded.

A step is trained if no finished step has its fingerprint. What changed is found by comparing it with the newest
finished step of the same run at its position; fields that a step does not record are compared with the run's last
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.chain.plan import Plan
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import TaskSource
from pipelines.data.held_out import validation_part
from pipelines.data.identity import data_identity
from pipelines.data.sources import digest_of
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.runs.step_record import Setting, StepRecord

DONE, SCORED, RESUMED, TRAINED = "done", "scored", "resumed", "trained"
UNTRAINED, SEARCHED = "not trained yet", "its setting is searched first"
WORDS = {DONE: "done", SCORED: "will be scored", RESUMED: "will resume its training", TRAINED: "will be trained"}


@dataclass(frozen=True)
class StepAhead:
    """What will happen to a step.

    Attributes:
        state: done; scored (trained, some scores or sample answers are missing); resumed (from a checkpoint); trained.
        why: one reason per entry; empty if the step is done.
    """

    position: int
    task: str
    state: str
    why: tuple[str, ...] = ()

    def to_json(self) -> dict:
        return asdict(self)

    @property
    def sentence(self) -> str:
        words = WORDS[self.state]
        return f"{words}: {'; '.join(self.why)}" if self.why else words


def steps_ahead(config: PipelineConfig, run: RunDirectory, plan: Plan) -> list[StepAhead]:
    """What a run would do with every step of its plan."""
    before = run.config() if run.exists("config.yaml") else None
    recorded = [metrics for name in run.list("steps") if (metrics := run.metrics(f"steps/{name}"))]
    missing, unanswered, found = plan.missing_cells(run), plan.unanswered(run), []
    for step in plan.steps:
        state, why = DONE, tuple(f"no score on {name}" for name in missing.get(step.directory, ()))
        if count := len(unanswered.get(step.directory, ())):
            why += (f"{count} sample prompt{'s' if count > 1 else ''} without an answer",)
        if run.metrics(step.directory) is None:
            state, why = _state_of(run, step), tuple(_reasons(config, before, plan, step, recorded))
        elif why:
            state = SCORED
        found.append(StepAhead(step.position, step.label, state, why))
    return found


def trained_again(config: PipelineConfig, run: RunDirectory, plan: Plan) -> str | None:
    """A sentence on the first step that this run has finished with other settings or data, and what differs; None
    if there is none. Defaults are among the settings: a configuration that leaves one out changes with it.

    Raises:
        RunDirectoryError: the run was written in another format.
    """
    run.check_format()
    for step in steps_ahead(config, run, plan):
        if step.state in (TRAINED, RESUMED) and not {UNTRAINED, SEARCHED} & set(step.why):
            after = " and all steps after it" if step.position < len(plan.steps) else ""
            return f"step {step.position} ({step.task}){after} will be trained again: {'; '.join(step.why)}"
    return None


def _state_of(run: RunDirectory, step: StepPlan) -> str:
    if run.trained(step.directory) is not None:
        return SCORED
    return RESUMED if any(name.endswith(".json") for name in run.list(step.checkpoints)) else TRAINED


def _reasons(
    config: PipelineConfig, before: PipelineConfig | None, plan: Plan, step: StepPlan, recorded: list[StepRecord]
) -> Iterator[str]:
    if plan.undecided and step.position >= plan.undecided:
        yield SEARCHED
        return
    rivals = [metrics for metrics in recorded if metrics.position == step.position]
    last = max(rivals, key=lambda metrics: (metrics.tasks == step.tasks, metrics.finished), default=None)
    if last is None or before is None:
        yield UNTRAINED
        return
    reasons = list(_differences(config, before, plan, step, last))
    yield from reasons or ["something else that it depends on has changed"]


def _differences(
    config: PipelineConfig, before: PipelineConfig, plan: Plan, step: StepPlan, last: StepRecord
) -> Iterator[str]:
    if last.tasks != step.tasks:
        yield f"tasks {', '.join(last.tasks)} → {', '.join(step.tasks)}"
    if last.parent != step.parent:
        yield from _other_parent(config, before, plan, step, last)
    settings = (last.setting or Setting({}, {}, {})).to_json(), Setting.of(plan.setting(step)).to_json()
    yield from _changes(*settings)
    known = {task.name: task for task in before.tasks}
    for name in step.tasks:
        task, data = config.task(name), (last.data or {}).get(name)
        if data is None:
            continue
        if (digest := data_identity(task)["digest"]) != data.train.digest:
            yield f"the training data of {name} has changed (digest {data.train.digest[:8]} → {digest[:8]})"
        if data.validation and config.training.validate_every:
            digest = digest_of(validation_part(task), "validation")
            if digest != data.validation.digest:
                yield f"the validation data of {name} has changed (digest {data.validation.digest[:8]} → {digest[:8]})"
        if name in known:
            yield from _changes(_trained_by(known[name]), _trained_by(task), f"{name}.")


def _trained_by(task: TaskSource) -> dict:
    return task.training_identity() | task.model_dump(include={"learn"})


def _other_parent(
    config: PipelineConfig, before: PipelineConfig, plan: Plan, step: StepPlan, last: StepRecord
) -> Iterator[str]:
    if step.position > 1:
        above = plan.steps[step.position - 2]
        yield f"it follows step {above.position} ({above.label}), which is another one now"
        return
    if before.start_from != config.start_from or plan.start or last.parent_run:
        yield f"start_from {_shown(before.start_from)} → {_shown(config.start_from)}"
        return
    names = ("path", "revision", "dtype", "quantization")
    changed = list(_changes(*({n: getattr(c.base_model, n) for n in names} for c in (before, config)), "base_model."))
    yield from changed or [f"the files of base_model.path {config.base_model.path} have changed"]


def _changes(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    """`field old → new` of every field that differs, mappings by their dotted names."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            dot = "." if prefix and not prefix.endswith(".") else ""
            yield from _changes(before.get(name), after.get(name), f"{prefix}{dot}{name}")
    elif before != after:
        yield f"{prefix} {_shown(before)} → {_shown(after)}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
