"""`curlora tune`: runs the search before one step on its own; a later run of the chain uses its results."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.plan import Plan, planned
from pipelines.config.pipeline import PipelineConfig
from pipelines.data import held_out
from pipelines.distributed.zero_settings import ignored
from pipelines.errors import ConfigError, Problem, did_you_mean
from pipelines.lineage.background import Projector
from pipelines.preflight.data import check_data, check_trial_data
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.identity import StepPlan
from pipelines.runs.lease import acquire_lease
from pipelines.search import run_search, step_search
from pipelines.workers.ray_cluster import cluster, gpus_per_worker

EXAMPLE = "search: {space: {training.learning_rate: {low: 1.0e-4, high: 1.0e-1, log: true}}, trials: 16}"


def tune(
    config: PipelineConfig,
    task: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    verbose: bool = False,
    address: str | None = None,
) -> dict:
    """Search before the step of `task` (default: the first) and return the search's results; train nothing else.

    Raises:
        ConfigError: nothing to search, invalid data, or an earlier step is not trained yet.
        LeaseHeld: another driver is running this chain.
        RunFailed: no trial finished.
        RunStopped: the user asked the run to stop.
    """
    if config.search is None:
        raise ConfigError([Problem("search", f"is null; set what to search, e.g. {EXAMPLE}")])

    def warn(text: str) -> None:
        on_event(Event("warning", text=text))

    problems = check_data(config, warn)
    if problems:
        raise ConfigError(problems)
    if text := ignored(config):
        on_event(Event("warning", text=text))
    run = RunDirectory(config.run_uri)
    config, plan = planned(held_out.training_view(with_dtype(config, run, address)), run)
    if not plan.undecided:  # otherwise `planned` has checked it
        check_trial_data(config)
    step = _step_of(plan, run, task)
    target = step_search.search_of_step(config, step.position, step.parent, plan.base_fingerprint)
    with acquire_lease(run) as lease:
        run.open_for_writing(config)
        run.remove("stop.json")  # a request to an earlier driver
        found = target.found(run)
        if found is None:
            from pipelines.preflight.model import check_fits  # imports torch and PEFT

            check_fits(config, warn=warn)
            parent = plan.steps[step.position - 2].directory if step.position > 1 else None
            with (
                cluster(config, verbose, address),
                run_search.warm_groups(config, run, gpus_per_worker(config), verbose) as groups,
            ):
                found = run_search.search(target, run, parent, plan.base_directory, lease, groups, on_event)
        sent = Projector(run, config, [step.fingerprint for step in plan.decided]).finish()
        if sent.warning:
            warn(sent.warning)
        return found


def _step_of(plan: Plan, run: RunDirectory, task: str | None) -> StepPlan:
    """The step to search for.

    Raises:
        ConfigError: there is none of that task, or the steps before it are not trained yet.
    """
    names = [name for step in plan.steps for name in step.tasks]
    if task is not None and task not in names:
        raise ConfigError([Problem("--task", f"no task '{task}', {did_you_mean(task, names)}")])
    step = plan.steps[0] if task is None else next(step for step in plan.steps if task in step.tasks)
    untrained = [s.label for s in plan.steps[: step.position - 1] if run.metrics(s.directory) is None]
    if untrained:
        reason = f"'{task}' comes after {', '.join(untrained)}, not trained yet; train that first: curlora run"
        raise ConfigError([Problem("--task", reason)])
    return step
