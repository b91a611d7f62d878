"""The chain: which steps and cells are missing, in which segments they run, and watching them.

The driver decides and watches; it never trains. What is done stands in the run directory, so a second call of `run`
does only what is missing, after a crash as after a change of the configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import metrics as formulas
from pipelines.config import (
    BaseModelConfig,
    ClassificationTask,
    ConfigError,
    PipelineConfig,
    Problem,
    looks_local,
)
from pipelines.group import GroupLost, WorkerGroup
from pipelines.lineage import Projection
from pipelines.publish import already_published, publish
from pipelines.ray_cluster import cluster, early_cluster, gpus_per_worker
from pipelines.runs import Lease, RunDirectory, RunDirectoryError, StepPlan, fingerprint, step_fingerprint
from pipelines.start import Start, find_start, record_start
from pipelines.store import LineageError

WHOLE_FILE = 1 << 30  # larger weight files are fingerprinted by samples
STOP_SECONDS = 4.0  # for workers to write a checkpoint after a request to stop, before they are ended


SettingOf = Callable[[PipelineConfig, int, str, str], PipelineConfig | None]


class RunFailed(RuntimeError):
    """The chain stopped; what was finished stays, and the same command goes on from there."""


class RunStopped(RuntimeError):
    """Somebody asked the run to stop (Ctrl-C, SIGTERM, `curlora cancel`); the same command goes on from there."""


@dataclass(frozen=True)
class Plan:
    """A configuration turned into steps and score cells.

    Attributes:
        base_directory: the step directory of row 0: the base, or what the chain starts from.
        cell_keys: name of a task or corpus → identity of its score (test digest, metric, how it is scored).
        needed: step directory → names of all cells of that row.
        settings: the configuration that each step is trained under, in their order.
        undecided: position of the first step whose setting is still to be searched; it and what follows is here as
            the configuration stands.
        earlier: tasks that the step it starts from has learned; scored, not trained.
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

    @property
    def decided(self) -> tuple[StepPlan, ...]:
        return self.steps if self.undecided is None else self.steps[: self.undecided - 1]

    def setting(self, step: StepPlan) -> PipelineConfig:
        return self.settings[step.position - 1]

    def learned_at(self) -> dict[str, int]:
        """Task → row of the score matrix that is the first after its training."""
        return dict.fromkeys(self.earlier, 0) | {name: step.position for step in self.steps for name in step.tasks}

    def missing_cells(self, run: RunDirectory) -> dict[str, list[str]]:
        """step directory → cells that are not there yet."""
        missing = {}
        known = {self.base_directory, *(step.directory for step in self.decided)}
        for directory, names in self.needed.items():
            if directory not in known:
                continue
            row = run.metrics(directory)
            keys = {cell["key"] for cell in row["cells"]} if row else set()
            missing[directory] = [name for name in names if self.cell_keys[name] not in keys]
        return missing

    def missing_steps(self, run: RunDirectory) -> list[StepPlan]:
        return [step for step in self.decided if run.metrics(step.directory) is None]


# -- identity


def base_fingerprint(base: BaseModelConfig) -> str:
    """Identity of a base: its files' content (samples of very large files), or hub id and commit; dtype; bits."""
    numbers = {"dtype": base.dtype} | ({"quantization": base.quantization} if base.quantization else {})
    if not looks_local(base.path):
        return fingerprint({"hub": base.path, "commit": _hub_commit(base), **numbers})
    folder = Path(base.path)
    if not folder.is_dir():
        raise ConfigError([Problem("base_model.path", f"'{base.path}': no such folder; check the path or hub id")])
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    return fingerprint({"files": {p.name: _file_digest(p) for p in names}, **numbers})


def _hub_commit(base: BaseModelConfig) -> str | None:
    # slow import, needed for hub models only
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(base.path, "config.json", revision=base.revision)
    return extract_commit_hash(file, None)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file; of size, first MiB and 64 spread MiB where it is larger than a GiB."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE:
            while block := file.read(1 << 20):
                sha.update(block)
        else:
            for part in range(65):
                file.seek(part * (size - (1 << 20)) // 64)
                sha.update(file.read(1 << 20))
    return sha.hexdigest()


def make_plan(
    config: PipelineConfig, run: RunDirectory | None = None, setting_of: SettingOf = lambda config, *_: config
) -> Plan:
    """Steps with their fingerprints, and the cells that the metrics need.

    Args:
        run: where the plan is to be carried out: what an alias in `start_from` meant stands there.
        setting_of: (configuration, position, parent's fingerprint, base's) → what the step is trained under; None: a
            search has to find it first.

    Raises:
        ConfigError: `start_from` names nothing that this configuration can grow from.
    """
    from pipelines.data import data_identity  # imports `datasets`

    base = base_fingerprint(config.base_model)
    start = find_start(config, run)
    identities = {task.name: data_identity(task) for task in config.tasks}
    earlier = tuple(name for name in identities if start and start.knows(name, identities[name]["digest"]))
    new = [name for name in identities if name not in earlier]
    if not new:
        why = f"{start.named} has learned all of them already" if start else "there are none"
        raise ConfigError([Problem("tasks", f"{why}; add one")])
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
    first = f"steps/0-start-{start.fingerprint[:8]}" if start else f"steps/0-base-{base[:8]}"
    needed = _needed(config, first, steps, earlier)
    keys = _cell_keys(settings[0])
    return Plan(base, first, tuple(steps), keys, needed, tuple(settings), undecided, start, earlier)


def _cell_keys(config: PipelineConfig) -> dict[str, str]:
    from pipelines.data import score_identity

    return {source.name: fingerprint(score_identity(source, config)) for source in [*config.tasks, *config.retention]}


def _needed(
    config: PipelineConfig, first: str, steps: Sequence[StepPlan], earlier: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Row 0, then each step's own task, the one that comes next, and retention; all that was learned before as often
    as `evaluation.earlier_every` says, and after the last step.

    A head that is untrained has no score.
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


def has_untrained_head(config: PipelineConfig, name: str) -> bool:
    """Whether a task cannot be scored before its own training."""
    task = config.task(name)
    return isinstance(task, ClassificationTask) and task.head == "classifier"


# -- results


def build_results(config: PipelineConfig, plan: Plan, run: RunDirectory, status: str) -> dict:
    """`results.json`: the score matrix and everything computed from it."""
    last = plan.settings[-1]
    names = [task.name for task in config.tasks]
    rows = [run.metrics(plan.base_directory), *(run.metrics(step.directory) for step in plan.steps)]
    cells = [_cells_of(row, plan.cell_keys) for row in rows]
    scores = [[_value(row, name) for name in names] for row in cells]
    nll = {c.name: [_value(row, c.name, "nll") for row in cells] for c in config.retention}
    done = [row for row in rows[1:] if row]
    metric_names = [task.metric for task in config.tasks]
    learned_at = {name: plan.learned_at()[name] for name in names}
    first = next((row for row in done), {})
    results = {
        "run": config.name,
        "status": status,
        "base_model": config.base_model.path,
        "base_fingerprint": plan.base_fingerprint,
        "adapter": {"type": last.adapter.type, "r": last.adapter.r},
        "strategy": last.strategy.name,
        "start_from": {"run": plan.start.run_uri, "step": plan.start.directory} if plan.start else None,
        "tasks": names,
        "learned_at": learned_at,
        "metric": dict(zip(names, metric_names, strict=True)),
        "trainable_parameters": first.get("trainable_parameters"),
        "head_parameters": sum(row.get("head_parameters", 0) for row in done),
        "adapter_bytes": done[-1]["adapter_bytes"] if done else None,
        "scores": scores,
        "perplexity": {name: [formulas.perplexity(v) for v in series] for name, series in nll.items()},
        "nll": nll,
        "majority": {name: next((r[name]["majority"] for r in cells if name in r), None) for name in names},
        "extras": {name: found for name in names if any(found := [r.get(name, {}).get("extras") for r in cells])},
        **formulas.aggregates(scores, metric_names, nll, None if config.is_joint else list(learned_at.values())),
        "gate": None,
        "registry": None,
        "seconds": _seconds(run, [row for row in rows if row]),
        "steps": [_step_summary(step, row) for step, row in zip(plan.steps, rows[1:], strict=True)],
    }
    if config.search:
        from pipelines.search import summaries

        results["searches"] = summaries(config, run, plan.steps, plan.base_fingerprint)
    return results


def _cells_of(row: dict | None, keys: dict[str, str]) -> dict[str, dict]:
    """name → cell, of the cells that this configuration asks for."""
    cells = row["cells"] if row else []
    return {cell["name"]: cell for cell in cells if keys.get(cell["name"]) == cell["key"]}


def _value(row: dict[str, dict], name: str, field: str = "value") -> float | None:
    return row[name][field] if name in row else None


def _step_summary(step: StepPlan, row: dict | None) -> dict:
    row = row or {}
    return {
        "task": step.label,
        "fingerprint": step.fingerprint,
        "directory": step.directory,
        "mlflow_run_id": None,
        "seconds": row.get("seconds", {}),
        "tokens_per_second": row.get("training", {}).get("tokens_per_second"),
        "peak_memory_bytes": row.get("peak_memory_bytes"),
    }


def _seconds(run: RunDirectory, rows: list[dict]) -> dict:
    """Where the time went; what is neither training nor evaluation is overhead (start-up, loading, saving)."""
    train = sum(row["seconds"]["train"] for row in rows)
    evaluate = sum(row["seconds"]["evaluate"] for row in rows)
    segments = sum(event["seconds"] for _, event in run.events() if event["kind"] == "segment_finished")
    total = max(segments, sum(row["seconds"]["total"] for row in rows))
    return {"total": total, "train": train, "evaluate": evaluate, "overhead": total - train - evaluate}


# -- running


@dataclass
class Drive:
    """One call of `run_chain`: what its parts share.

    Attributes:
        known: names of the events that were reported already.
        groups: all worker groups; a search uses them side by side, the chain the first one.
    """

    config: PipelineConfig
    plan: Plan
    run: RunDirectory
    lease: Lease
    projector: Projector
    on_event: Callable[[dict], None]
    known: set[str]
    groups: list = field(init=False)

    @property
    def group(self) -> WorkerGroup:
        return self.groups[0]


def run_chain(
    config: PipelineConfig,
    on_event: Callable[[dict], None] = lambda event: None,
    verbose: bool = False,
    segment_length: int | None = None,
    address: str | None = None,
    redo: Sequence[str] = (),
    group: WorkerGroup | None = None,
) -> dict:
    """Do what is missing of a run and return its results.

    Args:
        on_event: called with every event of the run as it happens (progress bars).
        segment_length: steps a worker group does before the driver looks again; None: as many as possible.
        address: Ray cluster; None: RAY_ADDRESS, else a local one.
        redo: tasks or positions whose finished steps are to be trained again.
        group: workers to use and to leave as they are; None: a cluster and workers for this run alone.

    Raises:
        ConfigError: bad input, before any training.
        LeaseHeld: another driver works on this run.
        RunDirectoryError: a finished step lacks files.
        RunFailed: training stopped.
        RunStopped: somebody asked for it.
    """
    from pipelines.door import check_data

    run = RunDirectory(config.run_uri)
    with contextlib.ExitStack() as stack:
        if not group and (run.results() or {}).get("status") != "finished":
            stack.enter_context(early_cluster(verbose, address))
        problems = check_data(config, warn=lambda text: on_event({"kind": "warning", "text": text}))
        if problems:
            raise ConfigError(problems)
        config, plan = planned(config, run)
        lease = stack.enter_context(run.acquire_lease())
        run.open_for_writing(config)
        record_start(run, plan.start)
        run.remove("stop.json")  # it was meant for an earlier driver
        _forget(run, plan, redo)
        _check_files(run, plan)
        projector = Projector(run, config, [step.fingerprint for step in plan.steps])
        ran = bool(plan.missing_steps(run) or any(plan.missing_cells(run).values()) or plan.undecided)
        if ran:
            known = {name for name, _ in run.events()}
            drive = Drive(config, plan, run, lease, projector, on_event, known)
            with _stops_cleanly(drive), _workers(drive, group, verbose, address) as drive.groups:
                run.event("started", steps=len(plan.steps), done=len(plan.steps) - len(plan.missing_steps(run)))
                _save_results(run, config, plan, "running")
                _run_segments(drive, segment_length)
            plan = drive.plan
            run.remove("train")
            run.event("finished")
        results = _save_results(run, config, plan, "finished")
        return _publish(run, config, results, projector, on_event) | {"ran": ran}


def planned(config: PipelineConfig, run: RunDirectory) -> tuple[PipelineConfig, Plan]:
    """The configuration as its chain is trained, and the plan with every setting that a search has found so far."""
    if not config.search:
        return config, make_plan(config, run)
    from pipelines.judging import check_judging_data, training_view
    from pipelines.search import settings_found

    config = training_view(config) if config.search.when else config
    plan = make_plan(config, run, settings_found(run))
    if plan.undecided:
        check_judging_data(config)
    return config, plan


@contextlib.contextmanager
def _workers(drive: Drive, group: WorkerGroup | None, verbose: bool, address: str | None):
    """The given group; or those of this run alone, on a cluster that is left or ended with them.

    Raises:
        ConfigError: the adapter does not fit the model, or the workers the cluster.
    """
    config = drive.config
    if group:
        check_fits(config)
        yield [group]
        return
    with cluster(config, verbose, address):
        if drive.plan.undecided:
            check_fits(config)
            from pipelines.search import warm_groups

            with warm_groups(config, drive.run, gpus_per_worker(config), verbose) as groups:
                yield groups
            return
        group = WorkerGroup(config, config.run_uri, gpus_per_worker(config), verbose)
        group.start()
        try:
            check_fits(config)  # meanwhile the workers import what they need
        except ConfigError:
            group.kill()
            raise
        yield [group]
        group.close()


@contextlib.contextmanager
def _stops_cleanly(drive: Drive) -> Iterator[None]:
    """However the run ends early, results.json says so; a request to stop is taken back."""
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
        raise RunFailed(f"{error}; free or mend the storage, then run the same command again") from error


def _record_end(drive: Drive, status: str, **fields: Any) -> None:
    with contextlib.suppress(OSError):  # a full disk: what is there stays as it is
        drive.run.event(status, **fields)
        _save_results(drive.run, drive.config, drive.plan, status)
        drive.run.remove("stop.json")


def _forget(run: RunDirectory, plan: Plan, redo: Sequence[str]) -> None:
    """Delete finished steps that are to be trained again; their successors stay, as the same training gives the same.

    Raises:
        ConfigError: there is no such step.
    """
    for name in redo:
        step = next((s for s in plan.steps if name in (*s.tasks, str(s.position))), None)
        if step is None:
            known = ", ".join(f"{s.position} ({s.label})" for s in plan.steps)
            raise ConfigError([Problem("--redo", f"no step '{name}'; the steps are {known}")])
        run.event("redo", fingerprint=step.fingerprint, task=step.label, position=step.position)
        run.remove(f"{step.directory}/metrics.json")  # first: from here on the step is not done
        run.remove(step.directory)


def _check_files(run: RunDirectory, plan: Plan) -> None:
    """Raises RunDirectoryError if a finished step lacks what it published (adapter, heads, strategy state)."""
    problems = []
    if plan.start and plan.missing_steps(run):
        files = (plan.start.run.metrics(plan.start.directory) or {"files": {"metrics.json": {"bytes": None}}})["files"]
        for name in plan.start.run.damaged_files(plan.start.directory, files):
            problems.append(f"start_from: {plan.start.run_uri}/{plan.start.directory}/{name} is missing or damaged")
    for step in plan.steps:
        metrics = run.metrics(step.directory)
        for name in run.damaged_files(step.directory, (metrics or {}).get("files", {})):
            problems.append(
                f"{step.directory}/{name} is missing or has another size, though the step is finished; restore it, "
                f"or train the step again: --redo {step.label}"
            )
    if problems:
        raise RunDirectoryError("\n".join(problems))


def _publish(run: RunDirectory, config: PipelineConfig, results: dict, projector: Projector, on_event) -> dict:
    """Verdict, report, lineage and registry; they follow the run directory and are made anew only where it changed."""
    if done := already_published(run, config, results):
        run.write_json("results.json", done)
        return done
    on_event({"kind": "reporting"})
    results, warnings = publish(run, config, results, projector.finish)
    for text in warnings:
        on_event({"kind": "warning", "text": text})
    return results


def _save_results(run: RunDirectory, config: PipelineConfig, plan: Plan, status: str) -> dict:
    results = build_results(config, plan, run, status)
    run.write_json("results.json", results)
    return results


def check_fits(config: PipelineConfig) -> None:
    from pipelines.preflight import check_model

    problems = check_model(config)
    if problems:
        raise ConfigError(problems)


def _run_segments(drive: Drive, segment_length: int | None) -> None:
    """Segment after segment; one that breaks off is started again as long as it gets on."""
    length = segment_length or len(drive.plan.steps)
    failures = 0
    while True:
        missing = drive.plan.missing_steps(drive.run)
        if not missing and not any(drive.plan.missing_cells(drive.run).values()):
            if drive.plan.undecided is None:
                return
            _search(drive)
            continue
        setting = drive.plan.setting(missing[0]) if missing else None
        alike = itertools.takewhile(lambda step, setting=setting: drive.plan.setting(step) == setting, missing)
        steps = tuple(itertools.islice(alike, length))
        begun, before = time.time(), _progress_made(drive)
        try:
            _run_segment(drive, steps)
            failures = 0
        except GroupLost as error:
            failures = failures + 1 if _progress_made(drive) == before else 0
            if failures > drive.config.durability.max_failures:
                reason = f"{error} (gave up after {failures} starts without progress: durability.max_failures)"
                raise RunFailed(and_then(reason)) from error
            drive.run.event("segment_lost", error=str(error))
        finally:
            drive.run.event(
                "segment_finished", seconds=time.time() - begun, steps=[step.fingerprint for step in steps]
            )


def _search(drive: Drive) -> None:
    """Find the setting of the first step that has none, and take over what its best trial has trained."""
    from pipelines import search

    plan, run = drive.plan, drive.run
    step = plan.steps[plan.undecided - 1]
    where = search.place(drive.config, step.position, step.parent, plan.base_fingerprint)
    parent = plan.steps[step.position - 2].directory if step.position > 1 else None

    def on_event(event: dict) -> None:
        drive.on_event(event)
        drive.projector.poke()

    search.search(where, run, parent, plan.base_directory, drive.lease, drive.groups, on_event)
    drive.plan = make_plan(drive.config, run, search.settings_found(run))
    drive.projector.chain = [step.fingerprint for step in drive.plan.steps]
    search.adopt(run, where, drive.plan.steps[step.position - 1])
    drive.known |= {name for name, _ in run.events()}


def _progress_made(drive: Drive) -> list:
    """What of the missing steps is done, in a form to compare."""
    steps = drive.plan.steps
    return [(drive.run.list(step.directory), drive.run.list(step.checkpoints)) for step in steps]


def _run_segment(drive: Drive, steps: tuple[StepPlan, ...]) -> None:
    """Hand a segment to the workers and follow it through the run directory until it is done.

    Raises:
        RunFailed: trying again cannot help, or the workers gave no sign of life for too long.
        RunStopped: somebody asked for it.
        GroupLost: the workers broke off for another reason.
    """
    plan, run = drive.plan, drive.run
    setting = plan.setting(steps[0]) if steps else plan.settings[max(len(plan.decided) - 1, 0)]
    number = drive.group.submit(
        {
            "run_uri": run.uri,
            "config": setting.model_dump(),
            "steps": [step.to_json() for step in steps],
            "base_directory": plan.base_directory,
            "base_fingerprint": plan.base_fingerprint,
            "start": plan.start.to_json() if plan.start else None,
            "missing": plan.missing_cells(run),
            "cell_keys": plan.cell_keys,
            "lease": drive.lease.token,
        }
    )
    try:
        result = _watch(drive, number)
    except GroupLost:
        raise
    except RunFailed:
        drive.group.kill()  # its workers have raised, or are silent
        raise
    except BaseException:
        _end_workers(drive, number)
        raise
    if result["stopped"]:
        raise RunStopped(run.stop_requested() or "another driver has taken over this run")
    run.remove("progress.json")


def _watch(drive: Drive, number: int) -> dict:
    """The result of an assignment; reports what happens meanwhile."""
    alive, told = time.monotonic(), None
    result = None
    while result is None:
        result = drive.group.wait(number)
        for name, event in drive.run.events(drive.known):
            drive.known.add(name)
            alive = time.monotonic()
            _handle(drive, event)
        progress = drive.run.read_json("progress.json")
        if progress and (mark := (progress["worker"], progress["serial"])) != told:
            alive, told = time.monotonic(), mark
            drive.on_event(progress)
        _check_alive(drive, alive)
        if result is None and (reason := drive.run.stop_requested()):
            raise RunStopped(reason)
    return result


def _handle(drive: Drive, event: dict) -> None:
    drive.on_event(event)
    if event["kind"] == "worker_error":
        raise RunFailed(and_then(event["error"]))
    if event["kind"] == "published":
        _save_results(drive.run, drive.config, drive.plan, "running")
        drive.projector.poke()


def _check_alive(drive: Drive, alive: float) -> None:
    """Raises if this driver is not in charge any more, or the workers have been silent for too long."""
    import ray

    if drive.lease.lost:
        raise RunStopped("another driver has taken over this run")
    limit = drive.config.durability.start_timeout
    if time.monotonic() - alive > limit:
        there = ", ".join(f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU"))
        raise RunFailed(
            and_then(
                f"no sign of life from the workers for {limit:g} s (durability.start_timeout); "
                f"{drive.config.resources.workers} workers may not fit the cluster (free: {there or 'nothing'}), "
                "or it is still starting nodes"
            )
        )


def _end_workers(drive: Drive, number: int) -> None:
    """Give the workers a moment to write a checkpoint, then end them."""
    with contextlib.suppress(OSError, GroupLost):
        if drive.run.stop_requested() is None:
            drive.run.request_stop("the driver ends")
        drive.group.wait(number, STOP_SECONDS)
    drive.group.kill()


def and_then(reason: str) -> str:
    return f"{reason}\nWhat was finished is kept; run the same command to go on from there."


# -- lineage beside the run


class Projector:
    """Sends the run to MLflow from a thread of its own: a slow or absent server never holds up training."""

    def __init__(self, run: RunDirectory, config: PipelineConfig, chain: Sequence[str]):
        self.run, self.tracking, self.chain = run, config.tracking, chain
        self.runs: dict[str, str] = {}
        self.warning: str | None = None
        self._projection = Projection(run, self.tracking.uri, self.tracking.experiment) if self.tracking else None
        self._wanted = threading.Event()
        self._stop = self._started = False

    def poke(self) -> None:
        """There is something new to send."""
        if self.tracking is None:
            return
        if not self._started:
            self._started = True
            self._thread = threading.Thread(target=self._loop, daemon=True, name="lineage")
            self._thread.start()
        self._wanted.set()

    def finish(self) -> tuple[dict[str, str], str | None]:
        """Send the rest and wait; (fingerprint → MLflow run id, warning if it could not be sent)."""
        if self.tracking is None:
            return {}, None
        self._stop = True
        self.poke()
        self._thread.join()
        self._started = self._stop = False
        return self.runs, self.warning

    def _loop(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            last = self._stop
            try:
                self.runs = self._projection.send(self.chain)
                self.warning = None
            except LineageError as error:
                self.warning = str(error)
            except Exception as error:  # a fault in the projection must not cost the user a finished chain
                self.warning = (
                    f"lineage failed ({type(error).__name__}: {error}); send it later: curlora sync {self.run.uri}"
                )
            if last:
                return
