"""Hyperparameter search: Ray Tune chooses the setting of a step on validation data before the chain trains the step.

Ray Tune proposes settings, compares them at rungs (ASHA) and stops those that fall behind. Each trial is a
DeepSpeed-sharded run on a worker group that is reused from trial to trial (`trial.py`). Tune's own actors reserve no
CPU, so they cannot deadlock with the workers. All state lies below `<run>/search/<k>-<task>-<fp8>/`: a search that
was interrupted or extended repeats no trial that has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import search_space
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search import Range, SearchConfig
from pipelines.config.search_space import Values, settings, trials, with_values
from pipelines.errors import ConfigError, Problem, RunFailed, RunStopped, and_then
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.identity import fingerprint
from pipelines.runs.lease import Lease
from pipelines.runs.step_record import Cell
from pipelines.search import objective, table
from pipelines.search.step_search import StepSearch
from pipelines.search.trial import prune
from pipelines.search.trial_spec import Spec
from pipelines.workers.assignment import Assignment
from pipelines.workers.failures import GroupLost, WorkersFailed, WorkersSilent
from pipelines.workers.group import RemoteGroup, groups_that_fit
from pipelines.workers.ray_cluster import capacity
from pipelines.workers.supervision import STOP_SECONDS, Supervisor

CHECKED_MODELS = 24  # settings whose adapters are tried on the model (on the meta device) before anything starts
POLL_SECONDS = 1.0  # interval at which the workers that score the reference are polled


@dataclass
class Running:
    """State shared by the functions of one search."""

    target: StepSearch
    run: RunDirectory
    spec: Spec
    lease: Lease
    groups: list[RemoteGroup]
    on_event: Callable[[Event], None]

    @property
    def search(self) -> SearchConfig:
        return self.target.config.search

    def reason_to_stop(self) -> str | None:
        if self.lease.lost:
            return "another driver has taken over this run"
        return self.run.stop_requested()

    def report(self, kind: str, text: str, **fields: Any) -> None:
        self.run.event(kind, task=self.target.label, position=self.target.position, text=text, **fields)
        self.on_event(Event("search", text=f"search before {self.target.label}: {text}"))


def search(
    target: StepSearch,
    run: RunDirectory,
    parent_directory: str | None,
    base_directory: str,
    lease: Lease,
    groups: list[RemoteGroup],
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict:
    """Find the setting of a step; write the search's `results.json` below the run and return it.

    Args:
        parent_directory: the finished step that the trials start from; None: the base model.
        groups: worker groups; each runs one trial at a time.

    Raises:
        ConfigError: a setting does not fit the model.
        RunFailed: no trial finished.
        RunStopped: the user asked the run to stop.
    """
    from pipelines.preflight.model import with_packing  # imports torch

    begun = time.time()
    spec = _spec(target, run, parent_directory, base_directory, lease)
    running = Running(target, run, spec, lease, groups, on_event)
    known = settings(running.search)
    _check_models(target, known)
    running.report("search_started", f"{trials(running.search)} trials, {len(groups)} at a time")
    running.spec = spec = replace(spec, config=with_packing(spec.config), reference=_reference(running))
    records, unfinished = _run_trials(running, known)
    results = _results(running, records, unfinished, time.time() - begun)
    run.write_json(f"{target.folder}/results.json", results)
    run.write_bytes(f"{target.folder}/table.md", table.markdown(results).encode())
    run.write_bytes(f"figures/search-{target.position}-{target.label}.png", table.figure(results))
    running.report("search_finished", results["why"])
    return results


def _spec(target: StepSearch, run: RunDirectory, parent_directory: str | None, base_directory: str, lease: Lease):
    search = target.config.search
    levels = range(search.rungs, 0, -1) if search.scheduler == "asha" else ()
    return Spec(
        config=target.trial_config,
        uri=f"{run.uri}/{target.folder}",
        position=target.position,
        tasks=target.tasks,
        parent=target.parent,
        parent_files=(run.uri, parent_directory) if parent_directory else None,
        base_fingerprint=target.base,
        base_directory=base_directory,
        identities=target.identities,
        names=target.names,
        cell_keys=target.cell_keys,
        weight=search.objective.retention_weight,
        trial_training=dict(search.trial_training),
        rungs=tuple(1 / search.reduction**level for level in levels),
        comparable_train_loss=not any(
            _changes_the_loss(path) for tried in (search.space, *search.start_with) for path in tried
        ),
        reduction=search.reduction,
        lease=lease.token,
        lease_uri=run.uri,
    )


def _changes_the_loss(path: str) -> bool:
    """Whether training losses under two values of this field cannot be compared (other rows or another objective)."""
    return path.startswith("strategy") or path == "training.max_length"


def _check_models(target: StepSearch, known: list[Values]) -> None:
    """Raises ConfigError where an adapter or a strategy of a setting does not fit the model."""
    from pipelines.preflight.model import check_model  # imports torch

    single = [{path: end} for path, space in target.config.search.space.items() for end in _ends(space)]
    seen, problems = set(), []
    for values in [*single, *known]:
        config = with_values(target.trial_config, values)
        identity = fingerprint([config.adapter.model_dump(), config.strategy.model_dump()])
        if identity in seen or len(seen) >= CHECKED_MODELS:
            continue
        seen.add(identity)
        label = search_space.describe(values)
        problems += [Problem(f"search: {label}: {p.field}", p.message) for p in check_model(config)]
    if problems:
        raise ConfigError(problems)


def _ends(space: Range | list) -> list:
    return space if isinstance(space, list) else [space.low, space.high]


# -- reference losses
def _reference(running: Running) -> dict[str, float]:
    """name → loss before the step, for earlier tasks and retained text; evaluates what has no score yet."""
    target, spec = running.target, running.spec
    names = [name for name in target.names if name not in target.tasks]
    if not names:
        return {}
    before = RunDirectory(f"{spec.uri}/before")
    from_base = spec.parent_files is None or target.config.adapter.carry == "fresh"
    directory = spec.base_directory if from_base else spec.parent_files[1]
    cells = _cells(before, directory)
    if not set(names) <= cells.keys():
        before.open_for_writing(spec.config)
        before.remove("stop.json")
        if not from_base:
            spec.copy_parent(before)
        _run_assignment(running, before, spec.assignment(before, spec.config, [], {directory: names}))
        cells = _cells(before, directory)
    return {name: objective.loss_of(cells[name].value, cells[name].metric) for name in names}


def _cells(run: RunDirectory, directory: str) -> dict[str, Cell]:
    row = run.metrics(directory)
    return {cell.name: cell for cell in row.cells} if row else {}


def _run_assignment(running: Running, run: RunDirectory, assignment: Assignment) -> None:
    """Run an assignment that is not a trial on the first worker group.

    Raises:
        RunFailed: the workers cannot do it.
        RunStopped: the run is to stop.
    """
    supervisor = Supervisor(running.groups[0], run, running.target.config.durability)
    while True:
        try:
            if supervisor.is_idle:
                supervisor.submit(assignment)
            result = supervisor.look(POLL_SECONDS)
        except GroupLost:
            continue
        except (WorkersFailed, WorkersSilent) as error:
            raise RunFailed(and_then(str(error))) from error
        reason = running.reason_to_stop()
        if result and not result["stopped"]:
            return
        if result or reason:
            reason = reason or "the workers were stopped"
            supervisor.end(reason)
            raise RunStopped(reason)


# -- trials
def _run_trials(running: Running, known: list[Values]) -> tuple[list[dict], int]:
    """(records of the trials that ended, number of trials that did not)."""
    from pipelines.search import ray_tune  # imports Ray Tune

    spec, search = running.spec, running.search
    sampler = None
    if search.algorithm == "optuna":
        sampler = ray_tune.optuna_sampler(
            search, [r["values"] for r in _recorded(running) if r["values"] not in known]
        )
    count = trials(search) if sampler else len(known)
    reported: set[int] = set()

    def on_end(number: int, values: Values) -> None:
        record = spec.run(values).read_json("trial.json")
        if record and number not in reported:
            reported.add(number)
            running.report("trial", _trial_text(record, number, count), number=number, status=record["status"])

    def on_prune(trial_id: str) -> None:
        proposals.pruned.add(trial_id)
        prune(spec, *proposals.proposed[trial_id])

    proposals = ray_tune.Proposals(known, count, len(running.groups), sampler, on_end)
    top = search.reduction**search.rungs
    scheduler = ray_tune.Halving(top, search.reduction, on_prune) if search.scheduler == "asha" else None
    watch = ray_tune.Watch(running.reason_to_stop, proposals)
    with _stop_trials_on_error(running, proposals):
        ray_tune.run_tune(spec, search, running.groups, proposals, scheduler, watch)
        if watch.reason:
            raise RunStopped(watch.reason)
        if proposals.lost >= ray_tune.LOST_TRIALS:
            raise RunFailed(
                f"the drivers of {proposals.lost} consecutive trials failed for reasons outside the trials; check "
                "that the cluster has room for the workers (resources.workers, durability.start_timeout)"
            )
    found = [(number, spec.run(values).read_json("trial.json")) for number, values in proposals.proposed.values()]
    records = {r["fingerprint"]: r | {"number": number} for number, r in reversed(found) if r}
    open_trials = [values for _, values in proposals.proposed.values() if not spec.run(values).exists("trial.json")]
    for values in open_trials:  # the time budget ended them
        spec.run(values).request_stop("search.time_budget is spent")
    return sorted(records.values(), key=lambda r: r["number"]), count - len(found) + len(open_trials)


def _recorded(running: Running) -> list[dict]:
    """Records of the trials that earlier starts of this search ran, in order."""
    folder = RunDirectory(f"{running.spec.uri}/trials")
    found = [folder.read_json(f"{name}/trial.json") for name in folder.list("")]
    return sorted((r for r in found if r), key=lambda r: r["number"])


@contextlib.contextmanager
def _stop_trials_on_error(running: Running, proposals) -> Iterator[None]:
    """On any error, stop unfinished trials; their workers write checkpoints first."""
    try:
        yield
    except BaseException:
        for _, values in proposals.proposed.values():
            trial = running.spec.run(values)
            if not trial.exists("trial.json"):
                with contextlib.suppress(OSError):
                    trial.request_stop("the search ends")
        for group in running.groups:
            with contextlib.suppress(GroupLost):
                group.end(STOP_SECONDS)
        raise


def _trial_text(record: dict, number: int, count: int) -> str:
    text = f"trial {number}/{count} {search_space.describe(record['values'])}: "
    if record["status"] == "failed":
        return text + f"failed ({record['error'].splitlines()[0]})"
    early = "" if record["status"] == "finished" else f", ended at step {record['steps']}/{record['total_steps']}"
    return text + f"objective {record['objective']:.4f}, learning {record['learning']:.4f}{early}"


# -- results
def _results(running: Running, records: list[dict], unfinished: int, seconds: float) -> dict:
    target, weight = running.target, running.search.objective.retention_weight
    chosen = objective.choose(records)
    if chosen is None:
        raise RunFailed(and_then(_no_winner_text(running, records, unfinished)))
    spent, whole = objective.steps_spent(records)
    return {
        "request": target.request,
        "task": target.label,
        "position": target.position,
        "parent": target.parent,
        "why": objective.explanation(chosen, records, weight),
        "rule": objective.RULE.format(weight=weight),
        "chosen": chosen,
        "pareto": [record["number"] for record in objective.pareto(records)],
        "trials": records,
        "unfinished": unfinished,
        "reference": running.spec.reference,
        "steps": {"spent": spent, "whole": whole},
        "seconds": seconds,
        "search": running.search.model_dump(),
    }


def _no_winner_text(running: Running, records: list[dict], unfinished: int) -> str:
    """Error message: why no trial finished, and what to change."""
    reasons = sorted({record["error"].splitlines()[0] for record in records if record["status"] == "failed"})
    remedies = []
    if reasons:
        remedies.append("change search.space to settings that can be trained: " + "; ".join(reasons))
    if unfinished:
        remedies.append(
            f"{unfinished} trials ran out of time: raise search.time_budget ({running.search.time_budget})"
        )
    return (
        f"search before '{running.target.label}': none of {len(records) + unfinished} trials finished; "
        + " and ".join(remedies)
    )


# -- worker groups
def concurrent(config: PipelineConfig, resources: dict, gpus: float) -> int:
    """Number of concurrent trials: what fits the cluster, limited by `max_concurrent` and by the number of trials."""
    room = groups_that_fit(config, resources, gpus)
    return max(1, min(room, config.search.max_concurrent or room, trials(config.search)))


@contextlib.contextmanager
def warm_groups(config: PipelineConfig, run: RunDirectory, gpus: float, verbose: bool) -> Iterator[list[RemoteGroup]]:
    """Worker groups for trials; the first one trains the chain as well, so the chain needs no further resources."""
    count = concurrent(config, capacity(), gpus)
    groups = [RemoteGroup(config, f"{run.uri}/search", gpus, verbose) for _ in range(count)]
    yield groups
    for group in groups:
        group.close()
    run.remove("search/train")
