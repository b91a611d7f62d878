"""A run in numbers: what sums it up, what happened to each task, and the tables of the terminal.

Everything is computed from `results.json`; figures and page use the same words and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.metrics.score_matrix import gain, higher_is_better
from pipelines.reporting.formatting import duration, number, signed, size, whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MANY = 12  # beyond this many tasks a matrix has no room for numbers, a chart none for names


@dataclass(frozen=True)
class Headline:
    """One number of a run, with one plain sentence about what it means."""

    group: str
    label: str
    value: str
    sentence: str


def headlines(results: dict) -> list[Headline]:
    """The numbers that sum a run up: what was learned, what was forgotten, what it cost."""
    directions = {higher_is_better(metric) for metric in results["metric"].values()}
    rows: list[tuple[str, str, str, str]] = []
    if True in directions:
        rows += _bounded_headlines(results)
    if False in directions:
        rows += _text_headlines(results)
    if results["nll"]:
        ratio = number(results["perplexity_ratio"])
        meaning = "Perplexity on retained text, after / before. 1 = general language unharmed, above 1 = harmed."
        rows.append(("forgotten", "perplexity ratio", ratio, meaning))
    return [Headline(*row) for row in [*rows, *_cost_headlines(results)]]


def _bounded_headlines(results: dict) -> list[tuple[str, str, str, str]]:
    return [
        (
            "learned",
            "average accuracy",
            number(results["average_accuracy"]),
            "Mean score over all tasks at the end of the sequence. Higher is better.",
        ),
        (
            "learned",
            "learning accuracy",
            number(results["learning_accuracy"]),
            "Mean score of each task right after its own training. Higher is better.",
        ),
        (
            "forgotten",
            "backward transfer",
            signed(results["backward_transfer"]),
            "Mean change of the earlier tasks since their own training. Negative = forgetting.",
        ),
        (
            "forgotten",
            "forgetting",
            number(results["forgetting"]),
            "Mean drop of the earlier tasks from their best score. 0 = nothing forgotten.",
        ),
    ]


def _text_headlines(results: dict) -> list[tuple[str, str, str, str]]:
    return [
        (
            "learned",
            "average NLL",
            number(results.get("nll_average")),
            "Mean loss of the text tasks at the end, in nats a token. Lower is better.",
        ),
        (
            "learned",
            "NLL learning",
            signed(results["nll_learning"]),
            "Nats a token that each text task gained by its own training. Higher is better.",
        ),
        (
            "forgotten",
            "NLL backward transfer",
            signed(results["nll_backward_transfer"]),
            "Mean change of the earlier text tasks since their own training. Negative = forgetting.",
        ),
    ]


def _cost_headlines(results: dict) -> list[tuple[str, str, str, str]]:
    seconds = results["seconds"]
    split = ", ".join(f"{name} {duration(seconds.get(name))}" for name in ("train", "evaluate", "overhead"))
    memory = [step["peak_memory_bytes"] for step in results["steps"] if step.get("peak_memory_bytes")]
    heads = results.get("head_parameters") or 0
    extra = f" {heads:,} more in classifier heads, counted apart." if heads else ""
    return [
        (
            "cost",
            "trainable parameters",
            whole(results["trainable_parameters"]),
            f"Numbers that the adapter trains; the base stays frozen.{extra}",
        ),
        ("cost", "adapter size", size(results["adapter_bytes"]), "Bytes of one step's adapter on disk."),
        ("cost", "time", duration(seconds["total"]), f"Wall clock of the whole chain: {split}."),
        ("cost", "peak memory", size(max(memory, default=None)), "The largest of all steps and workers."),
    ]


def row_labels(results: dict) -> list[str]:
    """`base`, then one label for every trained row."""
    first = "start" if results.get("start_from") else "base"
    return [first, *(f"{k} {step['task']}" for k, step in enumerate(results["steps"], start=1))][
        : len(results["scores"])
    ]


def is_joint(results: dict) -> bool:
    return results["strategy"] == "joint"


def trained_row(results: dict, column: int) -> int:
    """The row right after a task's own training."""
    default = 1 if is_joint(results) else column + 1
    return results.get("learned_at", {}).get(results["tasks"][column], default)


def direction(metric: str) -> str:
    return "higher is better" if higher_is_better(metric) else "lower is better"


def arrow(metric: str) -> str:
    return "↑" if higher_is_better(metric) else "↓"


def goodness(column: Sequence[float | None], metric: str) -> list[float | None]:
    """A column on 0 … 1 where 1 is best, on a scale that does not inflate small differences.

    Scores in [0, 1] stay what they are. An NLL becomes exp(best − value): 1 for the column's best, 0.37 one nat above.
    """
    if higher_is_better(metric):
        return list(column)
    best = min((value for value in column if value is not None), default=0.0)
    return [None if value is None else math.exp(best - value) for value in column]


@dataclass(frozen=True)
class TaskHistory:
    """What happened to one task: before, right after its training, at its best and at the end.

    `change` is final against learned, negative = forgetting for either direction of the metric; None for what was
    trained last, which had no time to be forgotten.
    """

    name: str
    metric: str
    majority: float | None
    base: float | None
    learned: float | None
    best: float | None
    final: float | None

    change: float | None


def histories(results: dict) -> list[TaskHistory]:
    scores = results["scores"]
    rows = []
    for column, name in enumerate(results["tasks"]):
        metric, own = results["metric"][name], trained_row(results, column)
        after = [row[column] for row in scores[own:] if row[column] is not None]
        learned = scores[own][column] if own < len(scores) else None
        change = None
        if learned is not None and len(after) > 1:
            change = gain(learned, after[-1], metric)
        rows.append(
            TaskHistory(
                name=name,
                metric=metric,
                majority=results["majority"].get(name),
                base=scores[0][column],
                learned=learned,
                best=(max if higher_is_better(metric) else min)(after) if after else None,
                final=after[-1] if after else None,
                change=change,
            )
        )
    return rows


# -- the terminal
def summary_table(results: dict) -> Table:
    """The score matrix; for a long sequence one line a task, which fits any terminal."""
    from rich.table import Table  # slow

    if len(results["tasks"]) > MANY // 2:
        return _history_table(results)
    table = Table(title="Scores on the test split after every step", title_justify="left")
    table.add_column("after", no_wrap=True)
    for name in results["tasks"]:
        metric = results["metric"][name]
        table.add_column(f"{name}\n{metric} {arrow(metric)}", justify="right", no_wrap=True)
    for index, (label, row) in enumerate(zip(row_labels(results), results["scores"], strict=True)):
        own = [trained_row(results, column) == index for column in range(len(row))]
        cells = [
            f"[bold]{number(value)}[/bold]" if mine else number(value) for value, mine in zip(row, own, strict=True)
        ]
        table.add_row(label, *cells)
    majority = [number(results["majority"].get(name)) for name in results["tasks"]]
    table.add_row("majority class", *majority, style="dim")
    return table


def _history_table(results: dict) -> Table:
    from rich.table import Table  # slow

    table = Table(title="Each task on its test split", title_justify="left")
    table.add_column("task", no_wrap=True)
    for header in ("metric", "majority", "base", "learned", "final", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in histories(results):
        numbers = map(number, (row.majority, row.base, row.learned, row.final))
        table.add_row(row.name, f"{row.metric} {arrow(row.metric)}", *numbers, signed(row.change))
    return table


def headline_table(results: dict) -> Table:
    from rich.table import Table  # slow

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim")
    for item in headlines(results):
        table.add_row(item.label, item.value, item.sentence)
    return table


def print_summary(results: dict, console: Console) -> None:
    """The end of `curlora run`: the score matrix and the numbers that sum it up."""
    console.print(summary_table(results))
    console.print(headline_table(results))


def print_verdict(results: dict, console: Console) -> None:
    """What the gate says and which version this run became; nothing without either."""
    gate, registered = results["gate"], results["registry"]
    if gate:
        word = {True: "passed", False: "refused", None: "undecided"}[gate["passed"]]
        console.print(f"gate: {word}", style="bold", highlight=False)
        for reason in [*gate["reasons"], *gate.get("notes", [])]:
            console.print(f"  {reason}", highlight=False, markup=False)
    if registered:
        role = "champion" if registered["promoted"] else "candidate"
        console.print(f"registered: {registered['uri']} ({role})", highlight=False, markup=False)
