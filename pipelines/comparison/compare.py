"""Compares methods on one sequence of tasks: runs over seeds, one table, paired intervals, a trade-off figure.

A method is an adapter of a catalogue, or `adapter+strategy`. Its learning rate is chosen from a small grid by the loss
on the first task's validation data. Every run is an ordinary run directory below `<storage>/<name>/`, so a comparison
that was interrupted, or that gets another method later, trains only what is missing. The runs share the scores of the
base model and as many warm worker groups as fit the cluster.
"""

from __future__ import annotations

import itertools
import math
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.chain.base_dtype import with_dtype
from pipelines.chain.driver import run_chain
from pipelines.chain.plan import make_plan
from pipelines.comparison.figures import examples_figure, tradeoff_figure
from pipelines.comparison.fronts import fronts
from pipelines.comparison.intervals import paired_intervals
from pipelines.comparison.methods import EXAMPLES_MARK, Comparison, Method
from pipelines.comparison.tables import AGGREGATES, as_csv, markdown
from pipelines.config.loading import parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.data.held_out import validation_view
from pipelines.errors import ConfigError, Problem, RunFailed
from pipelines.metrics.paired import mean_and_error
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.identity import fingerprint
from pipelines.runs.results import Results
from pipelines.search.objective import loss_of
from pipelines.workers.group import WorkerGroup, groups_that_fit
from pipelines.workers.ray_cluster import capacity, cluster, gpus_per_worker

if TYPE_CHECKING:
    from pipelines.chain.plan import Plan


def compare(
    comparison: Comparison,
    verbose: bool = False,
    address: str | None = None,
    on_event: Callable = lambda event: None,
    parallel: int | None = None,
) -> dict:
    """Run what is missing, seed by seed, and return the summary (see `summarise`).

    A method that fails is reported as such and does not end the comparison.

    Args:
        parallel: number of concurrent runs, each with `resources.workers` workers; None: as many as fit the cluster.

    Raises:
        ConfigError: a method's configuration is impossible, before anything is trained.
    """
    comparison = _with_dtype(comparison, address)
    configs = {m.name: _parsed(m, comparison.configuration(m)) for m in comparison.methods}
    first = next(iter(configs.values()))
    folder = RunDirectory(f"{first.storage}")
    with cluster(first, verbose, address):
        gpus = gpus_per_worker(first)
        count = parallel or groups_that_fit(first, capacity(), gpus)
        pool = GroupPool([WorkerGroup(first, folder.uri, gpus, verbose) for _ in range(count)], on_event)
        try:
            rates = _learning_rates(comparison, pool)
            seeds_and_methods = itertools.product(comparison.seeds, comparison.methods)
            pool.run([_config_of_run(comparison, m, seed, rates[m.name]) for seed, m in seeds_and_methods])
        finally:
            pool.close()
    return summarise(comparison, folder, rates)


def _with_dtype(comparison: Comparison, address: str | None) -> Comparison:
    """The comparison with one explicit `base_model.dtype` for all runs: that of runs that exist, if it says auto."""
    first = parse_config(comparison.configuration(comparison.methods[0]))
    runs = (RunDirectory(f"{first.storage}/{name}") for name in RunDirectory(first.storage).list(""))
    begun = next((run for run in runs if run.exists("config.yaml")), None)
    base = comparison.raw["base_model"] | {"dtype": with_dtype(first, begun, address).base_model.dtype}
    return replace(comparison, raw=comparison.raw | {"base_model": base})


class GroupPool:
    """Warm worker groups that share a list of runs; each group works on one run at a time."""

    def __init__(self, groups: Sequence[WorkerGroup], on_event: Callable):
        self.groups, self.on_event = list(groups), on_event
        self._idle: queue.SimpleQueue[WorkerGroup] = queue.SimpleQueue()
        for group in self.groups:
            self._idle.put(group)
        self._active: set[str] = set()  # URIs of the runs in progress

    def run(self, configs: Sequence[PipelineConfig]) -> list[Results | None]:
        """Train what is missing; results.json of each run, None where training failed. Ctrl-C stops all of them."""
        with ThreadPoolExecutor(len(self.groups), thread_name_prefix="run") as threads:
            futures = [threads.submit(self._run_one, config) for config in configs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                for uri in list(self._active):
                    RunDirectory(uri).request_stop("the comparison ends")
                raise

    def _run_one(self, config: PipelineConfig) -> Results | None:
        group = self._idle.get()
        self._active.add(config.run_uri)
        try:
            return _run(config, group, self.on_event)
        finally:
            self._active.discard(config.run_uri)
            self._idle.put(group)

    def close(self) -> None:
        for group in self.groups:
            group.close()


def _parsed(method: Method, raw: dict) -> PipelineConfig:
    try:
        config = parse_config(raw)
    except ConfigError as error:
        raise ConfigError(Problem(f"{method.name}: {p.field}", p.message) for p in error.problems) from error
    from pipelines.preflight.model import check_model  # imports torch

    if problems := check_model(config):
        raise ConfigError(Problem(f"{method.name}: {p.field}", p.message) for p in problems)
    return config


def _config_of_run(comparison: Comparison, method: Method, seed: int, rate: float | None) -> PipelineConfig:
    training = {"seed": seed} | ({"learning_rate": rate} if rate else {})
    return parse_config(comparison.configuration(method, **training) | {"name": f"{method.safe_name}-s{seed}"})


def _learning_rates(comparison: Comparison, pool: GroupPool) -> dict[str, float | None]:
    """Best learning rate of the grid per method, by validation loss on the first task; None if it is not tuned."""
    tuned = [method for method in comparison.methods if method.tuned and comparison.learning_rates]
    trials = list(itertools.product(tuned, comparison.learning_rates))
    configs: dict[str, PipelineConfig] = {}  # methods with the same training on the first task share their trials
    keys = []
    for method, rate in trials:
        config = tuning_config(comparison, method, rate)
        keys.append(fingerprint(config.model_dump(exclude={"name"})))
        configs.setdefault(keys[-1], config)
    found = dict(zip(configs, pool.run(list(configs.values())), strict=True))
    losses: dict[str, dict[float, float]] = {method.name: {} for method in tuned}
    for (method, rate), key in zip(trials, keys, strict=True):
        if found[key] is not None:
            losses[method.name][rate] = validation_loss(found[key])
    chosen = {
        name: min(found, key=found.get) if found else comparison.learning_rates[0] for name, found in losses.items()
    }
    return {method.name: chosen.get(method.name) for method in comparison.methods}


def tuning_config(comparison: Comparison, method: Method, rate: float) -> PipelineConfig:
    """A trial of a learning rate: the first task alone, scored on validation data."""
    from curlora.continual import make_strategy  # imports torch and PEFT

    raw = comparison.configuration(method, seed=comparison.seeds[0], learning_rate=rate)
    raw |= {"name": f"tune-{method.safe_name}-{rate:g}".replace(".", "_"), "retention": []}
    if raw.get("strategy", {}).get("name") != "joint":
        raw["tasks"] = raw["tasks"][:1]
    if make_strategy(**({"name": "sequential"} | raw.get("strategy", {}))).plain_at_first:
        raw |= {"strategy": {"name": "sequential"}, "adapter": raw.get("adapter", {}) | {"carry": "continue"}}
    config = parse_config(raw)
    tasks = [validation_view(task) for task in config.tasks]
    return config.model_copy(update={"tasks": tasks})


def validation_loss(results: Results) -> float:
    """Mean over the tasks of the NLL (text) or 1 − score (all others)."""
    last = [value for value in results.scores[-1] if value is not None]
    metrics = [results.metric[task] for task in results.tasks]
    losses = [loss_of(value, metric) for value, metric in zip(last, metrics, strict=True)]
    return math.fsum(losses) / len(losses)


def _run(config: PipelineConfig, group: WorkerGroup, on_event) -> Results | None:
    """Train what a run is missing; its results.json, or None if training failed."""
    reuse_base_scores(config, make_plan(config))
    on_event(Event("run", name=config.name))
    try:
        return run_chain(config, on_event, group=group)
    except RunFailed as error:
        on_event(Event("warning", text=f"{config.name} failed: {error}"))
        return None


def reuse_base_scores(config: PipelineConfig, plan: Plan) -> None:
    """Copy the scores of the base model from another run; what this run needs in addition is evaluated as usual."""
    run, base_directory = RunDirectory(config.run_uri), plan.base_directory
    if run.metrics(base_directory) or not plan.missing_cells(run)[base_directory]:
        return
    siblings = RunDirectory(config.storage)
    for name in siblings.list(""):
        other = RunDirectory(f"{config.storage}/{name}")
        if name != config.name and (metrics := other.metrics(base_directory)):
            for prediction in other.list(f"{base_directory}/predictions"):
                path = f"{base_directory}/predictions/{prediction}"
                run.write_bytes(path, other.read_bytes(path))
            run.write_json("format.json", other.read_json("format.json"))
            run.write_json(f"{base_directory}/metrics.json", metrics)
            return


# -- summary
def summarise(comparison: Comparison, folder: RunDirectory, rates: dict[str, float | None]) -> dict:
    """`{"name", "seeds", "reference", "methods": {name: {"learning_rate", "runs", figures …}}, "fronts"}`.

    Also written as JSON, CSV, Markdown and a figure into the comparison's folder. `fronts`: see `fronts.py`.
    """
    outcomes = {m.name: _finished(comparison, m, rates) for m in comparison.methods}
    methods = {name: _summary(list(runs.values()), rates[name]) for name, runs in outcomes.items() if runs}
    found = False
    for name, summary in methods.items():
        reference = f"{comparison.reference}{''.join(name.partition(EXAMPLES_MARK)[1:])}"
        found = found or reference in methods
        if name != reference and reference in methods:
            summary["against_reference"] = paired_intervals(outcomes[name], outcomes[reference])
    reference = comparison.reference if found else None
    result = {"name": comparison.name, "seeds": comparison.seeds, "reference": reference, "methods": methods}
    results = {name: {seed: run.results() for seed, run in runs.items()} for name, runs in outcomes.items()}
    result["fronts"] = fronts(results, comparison.reference or "")
    folder.write_json("comparison.json", result)
    folder.write_bytes("comparison.md", markdown(result).encode())
    folder.write_bytes("comparison.csv", as_csv(result).encode())
    folder.write_bytes("tradeoff.png", tradeoff_figure(result))
    if any(EXAMPLES_MARK in name for name in methods):
        folder.write_bytes("examples.png", examples_figure(result))
    return result


def _finished(comparison: Comparison, method: Method, rates: dict) -> dict[int, RunDirectory]:
    """Seed → finished run of the method."""
    uris = {s: _config_of_run(comparison, method, s, rates[method.name]).run_uri for s in comparison.seeds}
    runs = {seed: RunDirectory(uri) for seed, uri in uris.items()}
    return {seed: run for seed, run in runs.items() if run.is_finished}


def _summary(runs: list[RunDirectory], rate: float | None) -> dict:
    summary: dict = {"runs": len(runs), "learning_rate": rate}
    for key, _, _ in AGGREGATES:
        values = [v for run in runs if (v := _figure(run, run.results(), key)) is not None]
        summary[key] = mean_and_error(values)
    return summary


def _figure(run: RunDirectory, results: Results, key: str) -> float | None:
    if key == "train_seconds":
        return results.seconds.train
    if key == "kept_bytes":
        record = run.metrics(results.steps[-1].directory) if results.steps else None
        files = (record.files if record else None) or {}
        return sum(file.bytes for name, file in files.items() if name.startswith(("strategy/", "bank/")))
    if key not in ("tokens_per_second", "peak_memory_bytes"):
        return getattr(results, key)
    values = [value for step in results.steps if (value := getattr(step, key))]
    if not values:
        return None
    return max(values) if key == "peak_memory_bytes" else math.fsum(values) / len(values)
