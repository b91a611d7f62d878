"""Methods on one sequence, side by side: runs over seeds, one table, paired intervals, a picture of the trade-off.

A method is an adapter of a catalogue, or `adapter+strategy`. Its learning rate comes from a small grid, judged on the
first task's validation part. Every run is an ordinary run directory below `<storage>/<name>/`, so a comparison that
was interrupted, or gets another method later, trains only what is missing. The runs share the base's scores and as
many warm worker groups as the cluster holds.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.choice import loss_of
from pipelines.config import ConfigError, PipelineConfig, Problem, did_you_mean, parse_config, read_yaml
from pipelines.group import WorkerGroup, groups_that_fit
from pipelines.runs import RunDirectory, fingerprint

if TYPE_CHECKING:
    from pipelines.workflow import Plan

CATALOGUE = Path(__file__).parent / "methods.yaml"
RESAMPLES = 2000
FIGURES = (  # key in results.json, heading, digits
    ("learning_accuracy", "learning acc.", 3),
    ("average_accuracy", "average acc.", 3),
    ("backward_transfer", "backward tr.", 3),
    ("forgetting", "forgetting", 3),
    ("forward_transfer", "forward tr.", 3),
    ("nll_learning", "NLL learning", 3),
    ("nll_backward_transfer", "NLL backward tr.", 3),
    ("nll_average", "NLL average", 3),
    ("perplexity_ratio", "ppl ratio", 3),
    ("trainable_parameters", "parameters", 0),
    ("adapter_bytes", "adapter bytes", 0),
    ("tokens_per_second", "tokens/s", 0),
    ("peak_memory_bytes", "peak memory", 0),
)


AT = "@"  # between a method and the number of its training examples
ALONE = {"strategy": {"name": "sequential"}}  # an adapter without a strategy, whatever the sequence itself uses


@dataclass(frozen=True)
class Method:
    """A name and what it changes in a configuration; `tuned`: whether its learning rate is chosen from the grid."""

    name: str
    changes: dict
    tuned: bool = True

    @property
    def safe_name(self) -> str:
        return self.name.replace("+", "_").replace(AT, "-n")

    def on(self, examples: int) -> Method:
        """This method on at most so many training examples a task, called `name@examples`."""
        changes = merged(self.changes, {"training": {"max_train_examples": examples}})
        return replace(self, name=f"{self.name}{AT}{examples}", changes=changes)


@dataclass
class Comparison:
    """What is compared.

    Attributes:
        raw: the sequence's configuration as a plain mapping, without a method.
        learning_rates: the grid; empty: every method at the configuration's own.
        reference: the method that the paired intervals are against, on the same number of training examples.
    """

    raw: dict
    methods: list[Method]
    seeds: list[int]
    learning_rates: list[float] = field(default_factory=list)
    reference: str | None = None

    @property
    def name(self) -> str:
        return f"compare-{self.raw['name']}"

    def configuration(self, method: Method, **training: Any) -> dict:
        """The raw configuration of a method; `training` overrides that section."""
        raw = merged(self.raw, method.changes)
        raw = merged(raw, {"training": training, "tracking": None, "search": None})
        return raw | {"storage": f"{self.raw.get('storage', './runs')}/{self.name}"}


def merged(base: Any, changes: Any) -> Any:
    """`base` with the nested mapping `changes` laid over it; a section of another `type` or `name` starts empty."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    for key in ("type", "name"):
        if key in changes and key in base and "tasks" not in base and base[key] != changes[key]:
            return changes
    return base | {key: merged(base.get(key), value) for key, value in changes.items()}


def read_methods(names: Sequence[str], catalogue: Path = CATALOGUE) -> list[Method]:
    """The methods of those names; `a/b+c/d` stands for a+c, a+d, b+c and b+d.

    Raises:
        ConfigError: unknown names.
    """
    names = dict.fromkeys(name for pattern in names for name in _expand(pattern))
    known = read_yaml(catalogue)
    adapters, strategies = known.get("adapters", {}), known.get("strategies", {})
    methods, problems = [], []
    for name in names:
        adapter, plus, strategy = name.partition("+")
        if adapter not in adapters:
            problems.append(Problem("--methods", f"unknown adapter '{adapter}', {did_you_mean(adapter, adapters)}"))
        elif plus and strategy not in strategies:
            problems.append(
                Problem("--methods", f"unknown strategy '{strategy}', {did_you_mean(strategy, strategies)}")
            )
        else:
            changes = merged(strategies[strategy] if plus else ALONE, adapters[adapter])
            tuned = changes.get("tuned", True)
            methods.append(Method(name, {k: v for k, v in changes.items() if k != "tuned"}, tuned))
    if problems:
        raise ConfigError(problems)
    return methods


def _expand(pattern: str) -> list[str]:
    adapters, plus, strategies = pattern.partition("+")
    return [a + plus + s for a, s in itertools.product(adapters.split("/"), strategies.split("/"))]


# -- running


def compare(
    comparison: Comparison,
    verbose: bool = False,
    address: str | None = None,
    on_event: Callable = lambda event: None,
    parallel: int | None = None,
) -> dict:
    """Run what is missing, in order of seed, and return `{"methods": …, "table": …}`.

    A method that fails is reported as such and does not end the comparison.

    Args:
        parallel: runs at the same time, each with `resources.workers` workers; None: as many as the cluster holds.

    Raises:
        ConfigError: a method's configuration is impossible, before anything is trained.
    """
    import ray

    from pipelines.ray_cluster import cluster, gpus_per_worker

    configs = {m.name: _parsed(m, comparison.configuration(m)) for m in comparison.methods}
    first = next(iter(configs.values()))
    folder = RunDirectory(f"{first.storage}")
    with cluster(first, verbose, address):
        gpus = gpus_per_worker(first)
        count = parallel or groups_that_fit(first, ray.cluster_resources(), gpus)
        crew = Crew([WorkerGroup(first, folder.uri, gpus, verbose) for _ in range(count)], on_event)
        try:
            rates = _learning_rates(comparison, crew)
            seeds_and_methods = itertools.product(comparison.seeds, comparison.methods)
            crew.run([_config_of_run(comparison, m, seed, rates[m.name]) for seed, m in seeds_and_methods])
        finally:
            crew.close()
    return summarise(comparison, folder, rates)


class Crew:
    """Worker groups that take runs from one list, each a run at a time."""

    def __init__(self, groups: Sequence[WorkerGroup], on_event: Callable):
        self.groups, self.on_event = list(groups), on_event
        self._idle: queue.SimpleQueue[WorkerGroup] = queue.SimpleQueue()
        for group in self.groups:
            self._idle.put(group)
        self._active: set[str] = set()  # URIs of the runs at work

    def run(self, configs: Sequence[PipelineConfig]) -> list[dict | None]:
        """results.json of each run, all finished now; None where training failed. Ctrl-C stops them all."""
        with ThreadPoolExecutor(len(self.groups), thread_name_prefix="run") as pool:
            futures = [pool.submit(self._one, config) for config in configs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                for uri in list(self._active):
                    RunDirectory(uri).request_stop("the comparison ends")
                raise

    def _one(self, config: PipelineConfig) -> dict | None:
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
    from pipelines.preflight import check_model

    if problems := check_model(config):
        raise ConfigError(Problem(f"{method.name}: {p.field}", p.message) for p in problems)
    return config


def _config_of_run(comparison: Comparison, method: Method, seed: int, rate: float | None) -> PipelineConfig:
    training = {"seed": seed} | ({"learning_rate": rate} if rate else {})
    return parse_config(comparison.configuration(method, **training) | {"name": f"{method.safe_name}-s{seed}"})


def _learning_rates(comparison: Comparison, crew: Crew) -> dict[str, float | None]:
    """Each method's best of the grid on the first task's validation part; None where there is nothing to choose."""
    tuned = [method for method in comparison.methods if method.tuned and comparison.learning_rates]
    trials = list(itertools.product(tuned, comparison.learning_rates))
    configs: dict[str, PipelineConfig] = {}  # methods that train the first task alike share their trials
    keys = []
    for method, rate in trials:
        config = tuning_config(comparison, method, rate)
        keys.append(fingerprint(config.model_dump(exclude={"name"})))
        configs.setdefault(keys[-1], config)
    found = dict(zip(configs, crew.run(list(configs.values())), strict=True))
    losses: dict[str, dict[float, float]] = {method.name: {} for method in tuned}
    for (method, rate), key in zip(trials, keys, strict=True):
        if found[key] is not None:
            losses[method.name][rate] = validation_loss(found[key])
    chosen = {
        name: min(found, key=found.get) if found else comparison.learning_rates[0] for name, found in losses.items()
    }
    return {method.name: chosen.get(method.name) for method in comparison.methods}


def tuning_config(comparison: Comparison, method: Method, rate: float) -> PipelineConfig:
    """The first task alone, scored on what is not its test split."""
    from curlora.continual import STRATEGIES
    from pipelines.sources import validation_view

    raw = comparison.configuration(method, seed=comparison.seeds[0], learning_rate=rate)
    raw |= {"name": f"tune-{method.safe_name}-{rate:g}".replace(".", "_"), "retention": []}
    if raw.get("strategy", {}).get("name") != "joint":
        raw["tasks"] = raw["tasks"][:1]
    if STRATEGIES[raw.get("strategy", {}).get("name", "sequential")].plain_at_first:
        raw |= {"strategy": {"name": "sequential"}, "adapter": raw.get("adapter", {}) | {"carry": "continue"}}
    config = parse_config(raw)
    tasks = [validation_view(task) for task in config.tasks]
    return config.model_copy(update={"tasks": tasks})


def validation_loss(results: dict) -> float:
    """Lower is better: NLL of text, 1 − score of the rest; mean over the tasks."""
    last = [value for value in results["scores"][-1] if value is not None]
    kinds = [results["metric"][task] for task in results["tasks"]]
    return math.fsum(loss_of({"value": v, "metric": kind}) for v, kind in zip(last, kinds, strict=True)) / len(last)


def _run(config: PipelineConfig, group: WorkerGroup, on_event) -> dict | None:
    """results.json of a run that is now finished; None if its training failed."""
    from pipelines.workflow import RunFailed, make_plan, run_chain

    _share_base(config, make_plan(config))
    on_event({"kind": "run", "name": config.name})
    try:
        return run_chain(config, on_event, group=group)
    except RunFailed as error:
        on_event({"kind": "warning", "text": f"{config.name} failed: {error}"})
        return None


def _share_base(config: PipelineConfig, plan: Plan) -> None:
    """Copy the base's scores of another run here; cells that this one needs besides are evaluated as usual."""
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
    """`{"name", "seeds", "reference", "methods": {name: {"learning_rate", "runs", figures …}}}`, written as JSON, CSV,
    Markdown and a figure into the comparison's folder."""
    outcomes = {m.name: _finished(comparison, m, rates) for m in comparison.methods}
    methods = {name: _summary(list(runs.values()), rates[name]) for name, runs in outcomes.items() if runs}
    found = False
    for name, summary in methods.items():
        reference = f"{comparison.reference}{''.join(name.partition(AT)[1:])}"
        found = found or reference in methods
        if name != reference and reference in methods:
            summary["against_reference"] = paired(outcomes[name], outcomes[reference])
    reference = comparison.reference if found else None
    result = {"name": comparison.name, "seeds": comparison.seeds, "reference": reference, "methods": methods}
    folder.write_json("comparison.json", result)
    folder.write_bytes("comparison.md", markdown(result).encode())
    folder.write_bytes("comparison.csv", as_csv(result).encode())
    folder.write_bytes("tradeoff.png", tradeoff_figure(result))
    if any(AT in name for name in methods):
        folder.write_bytes("examples.png", examples_figure(result))
    return result


def _finished(comparison: Comparison, method: Method, rates: dict) -> dict[int, RunDirectory]:
    """The method's finished runs, by seed."""
    uris = {s: _config_of_run(comparison, method, s, rates[method.name]).run_uri for s in comparison.seeds}
    runs = {seed: RunDirectory(uri) for seed, uri in uris.items()}
    return {seed: run for seed, run in runs.items() if (run.results() or {}).get("status") == "finished"}


def _summary(runs: list[RunDirectory], rate: float | None) -> dict:
    results = [run.results() for run in runs]
    summary: dict = {"runs": len(runs), "learning_rate": rate}
    for key, _, _ in FIGURES:
        values = [v for v in (_figure(r, key) for r in results) if v is not None]
        summary[key] = mean_and_error(values)
    return summary


def _figure(results: dict, key: str) -> float | None:
    if key not in ("tokens_per_second", "peak_memory_bytes"):
        return results[key]
    values = [step[key] for step in results["steps"] if step[key]]
    if not values:
        return None
    return max(values) if key == "peak_memory_bytes" else math.fsum(values) / len(values)


def mean_and_error(values: Sequence[float]) -> list[float | None]:
    """[mean, standard error of the mean]; the error is None for one value, both for none."""
    if not values:
        return [None, None]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return [mean, None]
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [mean, math.sqrt(variance / len(values))]


# -- paired intervals


def paired(runs: Mapping[int, RunDirectory], reference: Mapping[int, RunDirectory]) -> dict | None:
    """95 % intervals of the difference to the reference method, over the same test examples.

    `learning` is the score right after a task's training, `forgetting` its loss from there to the end; both as means
    over tasks, higher = more, in units of score (1 − … nats a token for text). Examples are resampled within tasks;
    an example's outcome is its mean over the seeds that both methods have (None where there is no such seed).

    Args:
        runs, reference: the runs of each method by seed.
    """
    pairs = [(run, reference[seed]) for seed, run in runs.items() if seed in reference]
    if not pairs:
        return None
    tasks = pairs[0][0].results()["tasks"]
    learning, forgetting = [], []
    for position, task in enumerate(tasks):
        ours = [example_outcomes(run, position, task) for run, _ in pairs]
        theirs = [example_outcomes(run, position, task) for _, run in pairs]
        if any(o is None for o in ours + theirs):
            continue
        weight = ours[0].weight
        gain = np.mean([a.after - b.after for a, b in zip(ours, theirs, strict=True)], axis=0)
        learning.append((gain, weight))
        if position < len(tasks) - 1:
            loss = np.mean([(a.after - a.end) - (b.after - b.end) for a, b in zip(ours, theirs, strict=True)], axis=0)
            forgetting.append((loss, weight))
    return {"learning": bootstrap(learning), "forgetting": bootstrap(forgetting)}


@dataclass(frozen=True)
class Outcomes:
    """(examples,) score of each right after the task's training and at the end, higher is better; and its weight."""

    after: np.ndarray
    end: np.ndarray
    weight: np.ndarray


def example_outcomes(run: RunDirectory, position: int, task: str) -> Outcomes | None:
    """None where the run has no row of its own for the task (joint training)."""
    steps = run.results()["steps"]
    if len(steps) <= position or steps[position]["task"] != task:
        return None
    after, weight = _scores(run.read_jsonl(f"{steps[position]['directory']}/predictions/{task}.jsonl"))
    end, _ = _scores(run.read_jsonl(f"{steps[-1]['directory']}/predictions/{task}.jsonl"))
    return Outcomes(after, end, weight)


def _scores(outcomes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(score of each example, weight of each example): text counts by its tokens."""
    if "nll" in outcomes[0] and "tokens" in outcomes[0] and "correct" not in outcomes[0]:
        tokens = np.array([o["tokens"] for o in outcomes], dtype=float)
        return -np.array([o["nll"] for o in outcomes]) / np.maximum(tokens, 1), tokens
    scores = np.array([float(o.get("score", o["correct"])) for o in outcomes])
    return scores, np.ones(len(scores))


def bootstrap(parts: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> dict | None:
    """Mean over tasks of weighted means over examples, and its 95 % percentile interval.

    Args:
        parts: (values, weights) of each task.
    """
    if not parts:
        return None
    generator = np.random.default_rng(seed)
    draws = np.zeros(RESAMPLES)
    for values, weights in parts:
        chosen = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
        draws += (values * weights)[chosen].sum(1) / weights[chosen].sum(1)
    draws /= len(parts)
    mean = float(np.mean([np.average(values, weights=weights) for values, weights in parts]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


# -- views


def columns_of(result: dict) -> list[tuple[str, str, int]]:
    """The figures that some method has."""
    return [f for f in FIGURES if any(m[f[0]][0] is not None for m in result["methods"].values())]


def _cell(value: Sequence[float | None], digits: int) -> str:
    mean, error = value
    if mean is None:
        return "–"
    text = f"{mean:,.{digits}f}"
    return text if error is None or not digits else f"{text} ± {error:.{digits}f}"


def markdown(result: dict) -> str:
    """The table, and the paired intervals where there is a reference."""
    columns = columns_of(result)
    lines = ["| method | lr | runs | " + " | ".join(title for _, title, _ in columns) + " |"]
    lines.append("|---|---|---|" + "---|" * len(columns))
    for name, summary in result["methods"].items():
        rate = f"{summary['learning_rate']:g}" if summary["learning_rate"] else "config"
        cells = [_cell(summary[key], digits) for key, _, digits in columns]
        lines.append(f"| {name} | {rate} | {summary['runs']} | " + " | ".join(cells) + " |")
    if result["reference"]:
        lines += ["", f"Difference to {result['reference']}, 95 % interval over test examples:", ""]
        lines += ["| method | learning | forgetting |", "|---|---|---|"]
        for name, summary in result["methods"].items():
            if against := summary.get("against_reference"):
                lines.append(f"| {name} | {_interval(against['learning'])} | {_interval(against['forgetting'])} |")
    return "\n".join(lines) + "\n"


def _interval(value: dict | None) -> str:
    return "–" if value is None else f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def as_csv(result: dict) -> str:
    columns = columns_of(result)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["method", "learning_rate", "runs", *(f"{k}{s}" for k, _, _ in columns for s in ("", "_se"))])
    for name, summary in result["methods"].items():
        cells = [v for key, _, _ in columns for v in summary[key]]
        writer.writerow([name, summary["learning_rate"], summary["runs"], *cells])
    return out.getvalue()


KINDS = (  # learning, its key; forgetting, its key; the sign that makes forgetting positive
    ("learning accuracy", "learning_accuracy", "forgetting", "forgetting", 1),
    ("NLL learning, nats a token", "nll_learning", "NLL lost again, nats a token", "nll_backward_transfer", -1),
)


def tradeoff_figure(result: dict) -> bytes:
    """PNG: learning to the right, forgetting upwards (the best is at the lower right), one panel a kind of metric.

    The dashed line joins the methods that no other one beats in both (the Pareto front).
    """

    def draw(axis, learning, learning_key, forgetting, forgetting_key, sign) -> None:
        points = {}
        for name, summary in result["methods"].items():
            if point := _point(summary, learning_key, forgetting_key, sign):
                (x, dx), (y, dy) = point
                axis.errorbar(x, y, xerr=dx, yerr=dy, marker="o", capsize=2, linestyle="none")
                points[name] = (x, y)
        if points:
            axis.plot(*zip(*pareto_front(points.values()), strict=True), linestyle="--", color="0.6", zorder=0)
        axis.set(xlabel=f"{learning} →", ylabel=f"{forgetting} (lower is better)")
        axis.margins(x=0.15, y=0.08)
        _label(axis, points)

    return _panels(result, draw)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (learning, forgetting) that no other one beats in both, the one with the least learning first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _label(axis, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, higher where another name is in the way."""
    axis.figure.draw_without_rendering()  # before that nothing has a place
    placed: list = []
    for name, place in sorted(points.items(), key=lambda item: item[1][1]):
        text = axis.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        for higher in range(4, 100, 2):
            text.xyann = (5, higher)
            if not any(text.get_window_extent().overlaps(other) for other in placed):
                break
        placed.append(text.get_window_extent())


def examples_figure(result: dict) -> bytes:
    """PNG: what each method learns from how many training examples a task, one panel a kind of metric."""

    def draw(axis, learning, key, *_) -> None:
        lines: dict[str, list] = {}
        for name, summary in result["methods"].items():
            base, _, examples = name.partition(AT)
            if summary[key][0] is not None:
                lines.setdefault(base, []).append((int(examples), *summary[key]))
        for base, points in lines.items():
            x, y, errors = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=[e or 0 for e in errors], marker="o", capsize=2, label=base)
        axis.set(xscale="log", xlabel="training examples a task", ylabel=f"{learning} →")
        if lines:
            counts = sorted({point[0] for points in lines.values() for point in points})
            axis.set_xticks(counts, [f"{count:,}" for count in counts])
            axis.minorticks_off()
            axis.legend(fontsize=8)

    return _panels(result, draw)


def _panels(result: dict, draw: Callable) -> bytes:
    """A figure with a panel, drawn by `draw(axis, *kind)`, for each kind of metric that a method has learned by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [kind for kind in KINDS if any(m[kind[1]][0] is not None for m in result["methods"].values())] or KINDS[:1]
    figure, axes = plt.subplots(1, len(shown), figsize=(7 * len(shown), 5), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], shown, strict=True):
        draw(axis, *kind)
        axis.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    plt.close(figure)
    return out.getvalue()


def _point(summary: dict, x: str, y: str, sign: int) -> tuple | None:
    (x_mean, x_error), (y_mean, y_error) = summary[x], summary[y]
    return None if x_mean is None or y_mean is None else ((x_mean, x_error), (sign * y_mean, y_error))
