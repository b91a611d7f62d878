"""Drives a chain: finds the missing steps and score cells, runs them in segments on the workers, and supervises them.

The driver never trains. All progress is in the run directory, so running a chain again does only what is missing,
whether after a crash or after a change of the configuration.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.chain.adapter_folder import doubt, import_folder
from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.plan import Plan, make_plan, planned, stored_problems
from pipelines.chain.results import build_results
from pipelines.chain.start import find_start
from pipelines.chain.why import trained_again
from pipelines.config.pipeline import PipelineConfig
from pipelines.distributed.zero_settings import ignored
from pipelines.errors import ConfigError, Problem, RunDirectoryError, RunFailed, RunStopped, and_then
from pipelines.lineage.background import Projector
from pipelines.models.gguf import described
from pipelines.notify.sender import telling
from pipelines.preflight.data import check_data
from pipelines.preflight.tools import tool_problems
from pipelines.promotion.publish import already_published, publish
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.identity import StepPlan
from pipelines.runs.lease import Lease, acquire_lease
from pipelines.runs.results import Results
from pipelines.runs.start import record_start
from pipelines.search import run_search, step_search
from pipelines.workers.assignment import Assignment
from pipelines.workers.failures import GroupLost, WorkersFailed, WorkersSilent
from pipelines.workers.group import WorkerGroup
from pipelines.workers.ray_cluster import cluster, early_cluster, gpus_per_worker
from pipelines.workers.supervision import Supervisor


@dataclass
class Drive:
    """State shared by the functions of one call of `run_chain`.

    Attributes:
        groups: all worker groups; a search uses all of them concurrently, the chain uses the first one.
        supervisor: of the worker group that trains the chain.
    """

    config: PipelineConfig
    plan: Plan
    run: RunDirectory
    lease: Lease
    projector: Projector
    on_event: Callable[[Event], None]
    groups: list = field(init=False)
    supervisor: Supervisor = field(init=False)

    def supervise(self, groups: list) -> None:
        self.groups = groups
        self.supervisor = Supervisor(
            groups[0], self.run, self.config.durability, lambda: _progress_made(self), self.handle
        )

    def handle(self, event: Event) -> None:
        """Report an event; a published step is projected at once, one in training from its beginning."""
        self.on_event(event)
        if event.kind == "step_started":
            self.projector.notify()
        elif event.kind == "published":
            _save_results(self.run, self.config, self.plan, "running")
            self.projector.notify()


def run_chain(
    config: PipelineConfig,
    on_event: Callable[[Event], None] = lambda event: None,
    verbose: bool = False,
    segment_length: int | None = None,
    address: str | None = None,
    redo: Sequence[str] = (),
    group: WorkerGroup | None = None,
) -> Results:
    """Train and score everything that a run is missing and return its results.

    Args:
        on_event: called with every event of the run as it happens (progress bars).
        segment_length: steps per assignment to a worker group; None: as many as possible.
        address: Ray cluster; None: RAY_ADDRESS, else a local one.
        redo: tasks or positions whose finished steps are trained again.
        group: workers to use and to keep alive afterwards; None: start a cluster and workers for this run alone.

    Raises:
        ConfigError: the input is invalid; raised before any training.
        LeaseHeld: another driver is running this chain.
        RunDirectoryError: files of a finished step are missing.
        RunFailed: training failed.
        RunStopped: the user asked the run to stop.
    """
    run = RunDirectory(config.run_uri)
    with contextlib.ExitStack() as stack:
        config = _resolved_start(config, run, address)
        if not group and not run.is_finished:
            stack.enter_context(early_cluster(verbose, address))
        _check_data(config, on_event)
        config, plan = planned(with_dtype(config, run, address), run)
        _warn(on_event, doubt(config, plan.start))
        lease = stack.enter_context(acquire_lease(run))
        _warn(on_event, trained_again(config, run, plan))
        run.open_for_writing(config)
        stack.enter_context(telling(run, config, functools.partial(_warn, on_event)))
        import_folder(config, plan.start)
        record_start(run, plan.start)
        run.remove("stop.json")  # a request to an earlier driver
        _forget(run, plan, redo)
        _check_files(config, run, plan)
        projector = Projector(run, config, [step.fingerprint for step in plan.steps])
        if ran := bool(plan.missing_steps(run) or plan.lacks_scores(run) or plan.undecided):
            drive = Drive(config, plan, run, lease, projector, on_event)
            with _stops_cleanly(drive), _workers(drive, group, verbose, address) as groups:
                _train(drive, groups, segment_length)
            plan = drive.plan
        results = _save_results(run, config, plan, "finished")
        return replace(_publish(run, config, results, projector, on_event), ran=ran)


def _resolved_start(config: PipelineConfig, run: RunDirectory, address: str | None) -> PipelineConfig:
    """Check a GGUF file and `start_from`, which decides on the data type, before anything starts.

    Raises:
        ConfigError: one of them does not fit.
    """
    described(config.base_model)
    if config.start_from:
        config = with_dtype(config, run, address)
        find_start(config, run)
    return config


def _check_data(config: PipelineConfig, on_event: Callable[[Event], None]) -> None:
    """Raises ConfigError with every problem of the data and of missing tools; what prevents no run is a warning."""
    if problems := [*tool_problems(config), *check_data(config, functools.partial(_warn, on_event))]:
        raise ConfigError(problems)
    _warn(on_event, ignored(config))


def _warn(on_event: Callable[[Event], None], text: str | None) -> None:
    if text:
        on_event(Event("warning", text=text))


def _train(drive: Drive, groups: list, segment_length: int | None) -> None:
    """Train and score what is missing."""
    run, plan = drive.run, drive.plan
    drive.supervise(groups)
    run.event("started", steps=len(plan.steps), done=len(plan.steps) - len(plan.missing_steps(run)))
    _save_results(run, drive.config, plan, "running")
    _run_segments(drive, segment_length)
    run.remove("train")
    run.remove("live")
    run.event("finished")


@contextlib.contextmanager
def _workers(drive: Drive, group: WorkerGroup | None, verbose: bool, address: str | None):
    """The given group, or groups for this run alone on a cluster that is closed with them.

    Raises:
        ConfigError: the adapter does not fit the model, or the workers do not fit the cluster.
    """
    config = drive.config
    if group:
        _check_fits(drive)
        yield [group]
        return
    with cluster(config, verbose, address):
        if drive.plan.undecided:
            _check_fits(drive)
            with run_search.warm_groups(config, drive.run, gpus_per_worker(config), verbose) as groups:
                yield groups
            return
        group = WorkerGroup(config, config.run_uri, gpus_per_worker(config), verbose)
        group.start()
        try:
            _check_fits(drive)  # while the workers import their modules
        except ConfigError:
            group.kill()
            raise
        yield [group]
        group.close()


def _check_fits(drive: Drive) -> None:
    """Raises ConfigError if the adapter or the strategy does not fit the model."""
    from pipelines.preflight.model import check_fits  # imports torch and PEFT

    def warn(text: str) -> None:
        drive.on_event(Event("warning", text=text))

    check_fits(drive.config, drive.plan.steps[-1].depth, warn)


@contextlib.contextmanager
def _stops_cleanly(drive: Drive) -> Iterator[None]:
    """Record in results.json why the run ended early, and delete the request to stop."""
    try:
        yield
    except (KeyboardInterrupt, RunStopped) as stop:
        _record_end(drive, "stopped", reason=str(stop) or "interrupted")
        raise
    except RunFailed as error:
        _record_end(drive, "failed", error=str(error))
        raise
    except OSError as error:  # the driver's own writes
        _record_end(drive, "failed", error=str(error))
        raise RunFailed(f"{error}; free or repair the storage, then run the same command again") from error


def _record_end(drive: Drive, status: str, **fields: Any) -> None:
    with contextlib.suppress(OSError):  # a full disk: keep what is already written
        drive.run.event(status, **fields)
        _save_results(drive.run, drive.config, drive.plan, status)
        drive.run.remove("stop.json")


def _forget(run: RunDirectory, plan: Plan, redo: Sequence[str]) -> None:
    """Delete finished steps to be trained again; later steps stay, as training is deterministic.

    Raises:
        ConfigError: there is no such step.
    """
    for name in redo:
        step = next((s for s in plan.steps if name in (*s.tasks, str(s.position))), None)
        if step is None:
            known = ", ".join(f"{s.position} ({s.label})" for s in plan.steps)
            raise ConfigError([Problem("--redo", f"no step '{name}'; the steps are {known}")])
        run.event("redo", fingerprint=step.fingerprint, task=step.label, position=step.position)
        run.remove(f"{step.directory}/metrics.json")  # first: without it the step counts as not done
        run.remove(step.directory)


def _check_files(config: PipelineConfig, run: RunDirectory, plan: Plan) -> None:
    """Raises RunDirectoryError if published files of finished steps, or of the start, are missing or do not fit."""
    problems = stored_problems(config, run, plan)
    if problems:
        raise RunDirectoryError("\n".join(map(str, problems)))


def _publish(run: RunDirectory, config: PipelineConfig, results: Results, projector: Projector, on_event) -> Results:
    """Write verdict, report, lineage and registry entry, unless the run has not changed since they were written."""
    if done := already_published(run, config, results):
        run.write_json("results.json", done)
        return done
    on_event(Event("reporting"))
    results, warnings = publish(run, config, results, projector.finish)
    for text in (*warnings, projector.sent.note):
        _warn(on_event, text)
    return results


def _save_results(run: RunDirectory, config: PipelineConfig, plan: Plan, status: str) -> Results:
    results = build_results(config, plan, run, status)
    run.write_json("results.json", results)
    return results


def _run_segments(drive: Drive, segment_length: int | None) -> None:
    """Run segments until nothing is missing; a segment whose workers are lost is started again."""
    length = segment_length or len(drive.plan.steps)
    while True:
        missing = drive.plan.missing_steps(drive.run)
        if not missing and not drive.plan.lacks_scores(drive.run):
            if drive.plan.undecided is None:
                return
            _search(drive)
            continue
        setting = drive.plan.setting(missing[0]) if missing else None
        same_setting = itertools.takewhile(lambda step, setting=setting: drive.plan.setting(step) == setting, missing)
        steps = tuple(itertools.islice(same_setting, length))
        begun = time.time()
        try:
            _run_segment(drive, steps)
        except GroupLost as error:
            drive.run.event("segment_lost", error=str(error))
        finally:
            drive.run.event(
                "segment_finished", seconds=time.time() - begun, steps=[step.fingerprint for step in steps]
            )


def _search(drive: Drive) -> None:
    """Search the setting of the first step that has none, and adopt the winning trial's adapter if possible."""
    plan, run = drive.plan, drive.run
    step = plan.steps[plan.undecided - 1]
    target = step_search.search_of_step(drive.config, step.position, step.parent, plan.base_fingerprint)
    parent = plan.steps[step.position - 2].directory if step.position > 1 else None

    def on_event(event: Event) -> None:
        drive.on_event(event)
        drive.projector.notify()

    run_search.search(target, run, parent, plan.base_directory, drive.lease, drive.groups, on_event)
    drive.plan = make_plan(drive.config, run, step_search.settings_found(run))
    drive.projector.chain = [step.fingerprint for step in drive.plan.steps]
    step_search.adopt(run, target, drive.plan.steps[step.position - 1])
    drive.supervisor.ignore_errors_so_far()


def _progress_made(drive: Drive) -> list:
    """A snapshot of the steps' files; it changes whenever the workers make progress."""
    steps = drive.plan.steps
    return [(drive.run.list(step.directory), drive.run.list(step.checkpoints)) for step in steps]


def _run_segment(drive: Drive, steps: tuple[StepPlan, ...]) -> None:
    """Hand a segment to the workers and supervise it until it is done.

    Raises:
        RunFailed: a retry cannot help, or the workers stopped responding.
        RunStopped: the user asked the run to stop.
        GroupLost: the workers were lost for another reason; a retry may help.
    """
    try:
        drive.supervisor.submit(_assignment(drive, steps))
        result = _watch(drive)
    except WorkersFailed as error:
        raise RunFailed(and_then(str(error))) from error
    except WorkersSilent as error:
        raise RunFailed(and_then(f"{error}; {_room(drive.config)}")) from error
    except GroupLost:
        raise
    except BaseException:
        drive.supervisor.end("the driver ends")
        raise
    if result["stopped"]:
        raise RunStopped(drive.run.stop_requested() or "another driver has taken over this run")
    drive.run.remove("progress.json")


def _assignment(drive: Drive, steps: tuple[StepPlan, ...]) -> Assignment:
    from pipelines.preflight.model import with_packing  # imports torch

    plan = drive.plan
    setting = plan.setting(steps[0]) if steps else plan.settings[max(len(plan.decided) - 1, 0)]
    return Assignment(
        run_uri=drive.run.uri,
        config=with_packing(setting).model_dump(),
        steps=steps,
        base_directory=plan.base_directory,
        base_fingerprint=plan.base_fingerprint,
        missing=plan.missing_cells(drive.run),
        cell_keys=plan.cell_keys,
        start=plan.start.to_json() if plan.start else None,
        lease=drive.lease.token,
        questions=plan.questions,
        unanswered=plan.unanswered(drive.run),
    )


def _watch(drive: Drive) -> dict:
    """Wait for the result of the current assignment; raises RunStopped if the run is to stop."""
    while (result := drive.supervisor.look()) is None:
        if drive.lease.lost:
            raise RunStopped("another driver has taken over this run")
        if reason := drive.run.stop_requested():
            raise RunStopped(reason)
    return result


def _room(config: PipelineConfig) -> str:
    """Explains why workers may not have started."""
    import ray  # slow; the driver has connected long before

    free = ", ".join(f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU"))
    return (
        f"{config.resources.workers} workers may not fit the cluster (free: {free or 'nothing'}), or it is still "
        "starting nodes"
    )
