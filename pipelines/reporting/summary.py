"""Summary of a run: headline numbers, the history of each task, and the tables for the terminal.

Everything is computed from `results.json`; the figures and the report page use the same terms and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.metrics.score_matrix import gain, higher_is_better
from pipelines.reporting.formatting import duration, number, probability, signed, size, whole
from pipelines.runs.results import Results
from pipelines.runs.verdict import Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MANY = 12  # with more tasks, a matrix has no room for values and a chart none for names


@dataclass(frozen=True)
class Headline:
    """A headline number of a run and a sentence that explains it."""

    group: str
    label: str
    value: str
    sentence: str


def headlines(results: Results) -> list[Headline]:
    """The headline numbers: what was learned, what was forgotten, what it cost."""
    directions = {higher_is_better(metric) for metric in results.metric.values()}
    rows: list[tuple[str, str, str, str]] = []
    if True in directions:
        rows += _bounded_headlines(results)
    if False in directions:
        rows += _text_headlines(results)
    if results.nll:
        ratio = number(results.perplexity_ratio)
        meaning = "Perplexity on retained text, after / before. Above 1 = loss of general language ability."
        rows.append(("forgotten", "perplexity ratio", ratio, meaning))
    for name, found in (results.benchmarks or {}).items():
        value = f"{number(found.scores[0])} → {number(found.scores[-1])}"
        tested = "" if found.p is None else f" Loss on {found.examples} examples: p = {probability(found.p)}."
        rows.append(("forgotten", f"{name}, {found.metric}", value, f"Benchmark before and after the chain.{tested}"))
    return [Headline(*row) for row in [*rows, *_cost_headlines(results)]]


def _bounded_headlines(results: Results) -> list[tuple[str, str, str, str]]:
    return [
        (
            "learned",
            "average accuracy",
            number(results.average_accuracy),
            "Mean score over all tasks at the end of the sequence. Higher is better.",
        ),
        (
            "learned",
            "learning accuracy",
            number(results.learning_accuracy),
            "Mean score of each task right after its own training. Higher is better.",
        ),
        (
            "forgotten",
            "backward transfer",
            signed(results.backward_transfer),
            "Mean change of the earlier tasks since their own training. Negative = forgetting.",
        ),
        (
            "forgotten",
            "forgetting",
            number(results.forgetting),
            "Mean drop of the earlier tasks from their best score. 0 = nothing forgotten.",
        ),
    ]


def _text_headlines(results: Results) -> list[tuple[str, str, str, str]]:
    return [
        (
            "learned",
            "average NLL",
            number(results.nll_average),
            "Mean loss of the text tasks at the end, in nats per token. Lower is better.",
        ),
        (
            "learned",
            "NLL learning",
            signed(results.nll_learning),
            "Mean drop in loss of each text task by its own training, in nats per token. Higher is better.",
        ),
        (
            "forgotten",
            "NLL backward transfer",
            signed(results.nll_backward_transfer),
            "Mean change of the earlier text tasks since their own training. Negative = forgetting.",
        ),
    ]


def _cost_headlines(results: Results) -> list[tuple[str, str, str, str]]:
    seconds = results.seconds
    split = ", ".join(f"{name} {duration(getattr(seconds, name))}" for name in ("train", "evaluate", "overhead"))
    memory = [step.peak_memory_bytes for step in results.steps if step.peak_memory_bytes]
    heads = results.head_parameters or 0
    extra = f" {heads:,} more in classifier heads, counted apart." if heads else ""
    return [
        (
            "cost",
            "trainable parameters",
            whole(results.trainable_parameters),
            f"Parameters of the adapter; the base model stays frozen.{extra}",
        ),
        ("cost", "adapter size", size(results.adapter_bytes), "Size of one step's adapter on disk."),
        ("cost", "time", duration(seconds.total), f"Wall-clock time of the whole chain: {split}."),
        ("cost", "peak memory", size(max(memory, default=None)), "Maximum over all steps and workers."),
    ]


def story(results: Results) -> str:
    """The run in a few sentences."""
    count, done = len(results.tasks), sum(step.is_done for step in results.steps)
    how = "together, in one step" if is_joint(results) else "one after another"
    text = [f"{count} task{'s' if count > 1 else ''}, trained {how}." if count > 1 else "One task."]
    if results.start_from:
        earlier = sum(row == 0 for row in results.learned_at.values())
        text.append(f"The chain continues an earlier run, which had learned {earlier} of them.")
    if done < len(results.steps):
        text.append(f"{done} of {len(results.steps)} steps are done so far.")
    if results.learning_accuracy is not None:
        text.append(f"Right after its own training a task scored {number(results.learning_accuracy)} on average.")
    if results.nll_learning is not None:
        verb = "lowered" if results.nll_learning >= 0 else "raised"
        gain = number(abs(results.nll_learning))
        text.append(f"Training on a text task {verb} its loss by {gain} nats per token on average.")
    kept = [
        _kept(results.backward_transfer, "the earlier tasks", "points of score"),
        _kept(results.nll_backward_transfer, "the earlier text tasks", "nats per token"),
    ]
    if any(kept):
        text.append(f"By the end {' and '.join(filter(None, kept))}, on average.")
    ratio = results.perplexity_ratio
    if ratio is not None:
        change = 100 * (ratio - 1)
        verb = "rose" if change >= 0 else "fell"
        text.append(f"Perplexity on text that no task trains on {verb} by {abs(change):.1f}\u00a0%.")
    return " ".join(text)


def _kept(transfer: float | None, who: str, unit: str) -> str:
    if transfer is None:
        return ""
    return f"{who} had {'lost' if transfer < 0 else 'gained'} {number(abs(transfer))} {unit}"


def row_labels(results: Results) -> list[str]:
    """Labels of the rows of the score matrix: `base` or `start`, then one per step."""
    first = "start" if results.start_from else "base"
    return [first, *(f"{k} {step.task}" for k, step in enumerate(results.steps, start=1))][: len(results.scores)]


def is_joint(results: Results) -> bool:
    return results.strategy == "joint"


def trained_row(results: Results, column: int) -> int:
    """The row right after a task's own training."""
    default = 1 if is_joint(results) else column + 1
    return results.learned_at.get(results.tasks[column], default)


def direction(metric: str) -> str:
    return "higher is better" if higher_is_better(metric) else "lower is better"


def arrow(metric: str) -> str:
    return "↑" if higher_is_better(metric) else "↓"


def goodness(column: Sequence[float | None], metric: str) -> list[float | None]:
    """A column mapped to 0 … 1, where 1 is best, on a scale that does not inflate small differences.

    Scores in [0, 1] are kept. An NLL becomes exp(best − value): 1 for the best of the column, 0.37 one nat above it.
    """
    if higher_is_better(metric):
        return list(column)
    best = min((value for value in column if value is not None), default=0.0)
    return [None if value is None else math.exp(best - value) for value in column]


@dataclass(frozen=True)
class TaskHistory:
    """Scores of one task: before training, right after its own training, at its best and at the end.

    `change` is the gain from learned to final: negative = forgetting, whatever the metric's direction; None for the
    last task, after which nothing was trained.
    """

    name: str
    metric: str
    majority: float | None
    base: float | None
    learned: float | None
    best: float | None
    final: float | None
    change: float | None


def histories(results: Results) -> list[TaskHistory]:
    scores = results.scores
    rows = []
    for column, name in enumerate(results.tasks):
        metric, own = results.metric[name], trained_row(results, column)
        after = [row[column] for row in scores[own:] if row[column] is not None]
        learned = scores[own][column] if own < len(scores) else None
        change = None
        if learned is not None and len(after) > 1:
            change = gain(learned, after[-1], metric)
        rows.append(
            TaskHistory(
                name=name,
                metric=metric,
                majority=results.majority.get(name),
                base=scores[0][column],
                learned=learned,
                best=(max if higher_is_better(metric) else min)(after) if after else None,
                final=after[-1] if after else None,
                change=change,
            )
        )
    return rows


# -- tables for the terminal


def summary_table(results: Results) -> Table:
    """The score matrix; for a long sequence, one line per task, so that it fits any terminal."""
    from rich.table import Table  # slow

    if len(results.tasks) > MANY // 2:
        return _history_table(results)
    table = Table(title="Scores on the test split after every step", title_justify="left")
    table.add_column("after", no_wrap=True)
    for name in results.tasks:
        metric = results.metric[name]
        table.add_column(f"{name}\n{metric} {arrow(metric)}", justify="right", no_wrap=True)
    for index, (label, row) in enumerate(zip(row_labels(results), results.scores, strict=True)):
        own = [trained_row(results, column) == index for column in range(len(row))]
        cells = [
            f"[bold]{number(value)}[/bold]" if mine else number(value) for value, mine in zip(row, own, strict=True)
        ]
        table.add_row(label, *cells)
    majority = [number(results.majority.get(name)) for name in results.tasks]
    table.add_row("majority class", *majority, style="dim")
    return table


def _history_table(results: Results) -> Table:
    from rich.table import Table  # slow

    table = Table(title="Each task on its test split", title_justify="left")
    table.add_column("task", no_wrap=True)
    for header in ("metric", "majority", "base", "learned", "final", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in histories(results):
        numbers = map(number, (row.majority, row.base, row.learned, row.final))
        table.add_row(row.name, f"{row.metric} {arrow(row.metric)}", *numbers, signed(row.change))
    return table


def side_by_side_table(chains: dict[str, Results]) -> Table:
    """What each of several chains over the same tasks learned and kept; keys name the chains."""
    from rich.table import Table  # slow

    table = Table(title="The chains side by side", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("base", justify="right", no_wrap=True)
    for name in chains:
        for when in ("learned", "final"):
            table.add_column(f"{name}\n{when}", justify="right", no_wrap=True)
    for rows in zip(*(histories(results) for results in chains.values()), strict=True):
        cells = [number(value) for row in rows for value in (row.learned, row.final)]
        table.add_row(f"{rows[0].name}, {rows[0].metric} {arrow(rows[0].metric)}", number(rows[0].base), *cells)
    for label, value_of in (
        ("perplexity ratio", lambda results: number(results.perplexity_ratio)),
        ("time", lambda results: duration(results.seconds.total)),
    ):
        table.add_row(label, "", *(cell for results in chains.values() for cell in ("", value_of(results))))
    return table


def headline_table(results: Results) -> Table:
    from rich.table import Table  # slow

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim")
    for item in headlines(results):
        table.add_row(item.label, item.value, item.sentence)
    return table


def print_summary(results: Results, console: Console) -> None:
    """Printed at the end of `curlora run`: the score matrix and the headline numbers."""
    console.print(summary_table(results))
    console.print(headline_table(results))


def print_verdict(results: Results, console: Console) -> None:
    """Print the gate's verdict and the registered version, if there are any."""
    gate, registered = results.gate, results.registry
    if gate:
        console.print(f"gate: {Verdict.of(gate)}", style="bold", highlight=False)
        for reason in [*gate["reasons"], *gate.get("notes", [])]:
            console.print(f"  {reason}", highlight=False, markup=False)
    if registered and registered.get("failure"):
        found = f"not registered as {registered['name']}: {registered['failure']}"
        console.print(found, style="bold red", highlight=False, markup=False)
    elif registered:
        role = "champion" if registered["promoted"] else "candidate"
        console.print(f"registered: {registered['uri']} ({role})", highlight=False, markup=False)
