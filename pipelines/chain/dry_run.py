"""What `curlora run --dry-run` can say of the steps: the plan, or why `run` would refuse to make one."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.plan import Plan, planned, stored_problems
from pipelines.chain.start import find_start
from pipelines.chain.why import StepAhead, steps_ahead
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem
from pipelines.preflight.hub import is_hub_id
from pipelines.runs.directory import RunDirectory


@dataclass(frozen=True)
class Ahead:
    """The steps of a configuration.

    Attributes:
        plan: None if it cannot be made.
        steps: what a run would do with each step of the plan, and why.
        unchecked: what could not be checked, without access to the hub.
    """

    plan: Plan | None = None
    steps: list[StepAhead] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def depth(self) -> int | None:
        """Steps from the base to the last one."""
        return self.plan.steps[-1].depth if self.plan and self.plan.steps else None


def with_some_dtype(config: PipelineConfig) -> PipelineConfig:
    """`with_dtype`, also where `start_from` names no step, so that other problems are found as well."""
    run = RunDirectory(config.run_uri)
    try:
        return with_dtype(config, run)
    except ConfigError:
        base = with_dtype(config.model_copy(update={"start_from": None}), run).base_model
        return config.model_copy(update={"base_model": base})


def look_ahead(config: PipelineConfig, readable: bool) -> Ahead:
    """Plan the steps without running them.

    Args:
        readable: whether all data can be read; otherwise only `start_from` is checked.
    """
    run = RunDirectory(config.run_uri)
    try:
        if not readable:
            find_start(config, run)
            return Ahead()
        searched, plan = planned(config, run)
        return Ahead(plan, steps_ahead(searched, run, plan), stored_problems(searched, run, plan))
    except ConfigError as error:
        return Ahead(problems=error.problems)
    except OSError as error:
        if not is_hub_id(config.base_model.path):  # whose commit only the hub knows
            return Ahead(problems=[Problem("start_from" if config.start_from else "storage", str(error))])
        return Ahead(unchecked=[f"start_from ({config.start_from}): {error}"] if config.start_from else [])
