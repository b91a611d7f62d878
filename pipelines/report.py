"""What a run looks like: tables in the terminal, figures, and one self-contained page.

Everything is read from the run directory (`results.json`, the steps' `metrics.json`, `config.yaml`) and can be written
again at any time. The page loads nothing: styles are in its template, charts are inline SVG data. Whatever text comes
from a configuration or from data is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from pipelines.lineage import current_steps
from pipelines.metrics import gain, higher_is_better
from pipelines.runs import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

NONE = "–"
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
# Okabe & Ito's colours (told apart with any colour vision), without the yellow that vanishes on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
MANY = 12  # beyond this many tasks a matrix has no room for numbers, a chart none for names


class ReportError(RuntimeError):
    """There is nothing to report yet."""


# -- numbers


@dataclass(frozen=True)
class Headline:
    """One number of a run, with one plain sentence about what it means."""

    group: str
    label: str
    value: str
    sentence: str


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """With a sign; a real minus sign, and no negative zero."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes for people, decimal units."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


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
    from rich.table import Table

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
    from rich.table import Table

    table = Table(title="Each task on its test split", title_justify="left")
    table.add_column("task", no_wrap=True)
    for header in ("metric", "majority", "base", "learned", "final", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in histories(results):
        numbers = map(number, (row.majority, row.base, row.learned, row.final))
        table.add_row(row.name, f"{row.metric} {arrow(row.metric)}", *numbers, signed(row.change))
    return table


def headline_table(results: dict) -> Table:
    from rich.table import Table

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


# -- figures


def write_figures(run: RunDirectory) -> list[str]:
    """Write `figures/*.png`; returns their paths in the run. What a run has no data for is not drawn.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(results, steps)
        if figure is not None:
            run.write_bytes(f"figures/{name}.png", _render(figure, "png"))
            written.append(f"figures/{name}.png")
    return written


def _load(run: RunDirectory) -> tuple[dict, list[dict]]:
    results = run.results()
    if results is None:
        raise ReportError(f"run '{run.name}' has no results yet; start it with `curlora run`")
    return results, [metrics for _, metrics in current_steps(run)]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    # Imported here: matplotlib takes half a second. Figure alone needs no backend and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e3e7ec", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return figure, list(axes.flat)


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date and with fixed ids the same run gives the same file.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "curlora"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _colors(values: Iterable[float]) -> list[tuple[str, str]]:
    """(background, text) for goodness in 0 … 1: viridis, whose order shows with any colour vision and in grey.

    Black or white text, whichever has the higher contrast (at least 4.6 : 1; WCAG 2 luminance).
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    pairs = []
    for value in values:
        rgb = colormaps["viridis"](value)[:3]
        linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in rgb]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        pairs.append((to_hex(rgb), "#000000" if light > 0.179 else "#ffffff"))
    return pairs


def _shades(results: dict) -> list[list[float | None]]:
    """Goodness of every cell, by row."""
    columns = [
        goodness([row[column] for row in results["scores"]], results["metric"][name])
        for column, name in enumerate(results["tasks"])
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def draw_matrix(results: dict, _steps: list[dict]) -> Figure:
    """The score matrix as a heat map, every column in its own direction."""
    labels, tasks, shades = row_labels(results), results["tasks"], _shades(results)
    few = len(tasks) <= MANY
    scale = 1.0 if few else 0.16
    figure, (ax,) = _figure(2.2 + max(1.25 * scale * len(tasks), 3), 1.3 + max(0.42 * scale * len(labels), 1))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    values = [[math.nan if value is None else value for value in row] for row in shades]
    ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    if few:
        _write_numbers(ax, results, shades)
        headers = [f"{name}\n{results['metric'][name]}\n({direction(results['metric'][name])})" for name in tasks]
        ax.set_xticks(range(len(tasks)), headers, fontsize=8)
        ax.set_yticks(range(len(labels)), labels)
    ax.xaxis.set_ticks_position("top")
    ax.tick_params(length=0)
    ax.set_ylabel("after step" if few else "after step number")
    ax.set_title("Score of each task (columns) after every step (rows); brighter is better", fontsize=10)
    return figure


def _write_numbers(ax: Axes, results: dict, shades: list[list[float | None]]) -> None:
    from matplotlib.patches import Rectangle

    for t, row in enumerate(results["scores"]):
        for i, value in enumerate(row):
            text = "#55606e" if value is None else _colors([shades[t][i]])[0][1]
            own = trained_row(results, i) == t
            ax.text(i, t, number(value), ha="center", va="center", color=text, weight="bold" if own else "normal")
            if own and value is not None:
                ax.add_patch(Rectangle((i - 0.47, t - 0.44), 0.94, 0.88, fill=False, edgecolor=text, linewidth=1.5))


def draw_perplexity(results: dict, _steps: list[dict]) -> Figure | None:
    """Perplexity on each retained corpus along the sequence, one panel a corpus."""
    series = {name: values for name, values in results["perplexity"].items() if any(v is not None for v in values)}
    if not series:
        return None
    columns = min(len(series), 2)
    rows = math.ceil(len(series) / columns)
    figure, axes = _figure(6.6, 2.7 * rows, rows, columns)
    for ax in axes[len(series) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes, series.items(), strict=False):
        points = [(k, value) for k, value in enumerate(values) if value is not None]
        ax.axhline(points[0][1], color="#55606e", linewidth=1, linestyle=":")
        ax.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", markersize=5)
        _limits(ax, [value for _, value in points], least=0.05 * points[0][1])
        ax.set_title(f"{name}: {points[0][1]:.2f} → {points[-1][1]:.2f}", fontsize=10, loc="left")
        _sequence_axis(ax, results)
    figure.supylabel("perplexity (lower is better)", fontsize=9)
    return figure


def _limits(ax: Axes, values: Sequence[float], least: float) -> None:
    """From bottom to top at least `least`: a flat line should look flat."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = max(0.1 * (high - low), (least - (high - low)) / 2)
    ax.set_ylim(low - margin, high + margin)


def _sequence_axis(ax: Axes, results: dict) -> None:
    labels = row_labels(results)
    if len(labels) <= MANY:
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 4 else {}
        ax.set_xticks(range(len(labels)), labels, fontsize=8, **slant)
    else:
        ax.set_xlabel("position in the sequence", fontsize=9)
    ax.set_xlim(-0.3, len(labels) - 0.7)


def draw_tasks(results: dict, _steps: list[dict]) -> Figure | None:
    """Each task's score along the sequence: scores in [0, 1] in one panel, NLL in another."""
    groups = [
        (
            "score (higher is better)",
            [name for name in results["tasks"] if higher_is_better(results["metric"][name])],
        ),
        (
            "NLL, nats a token (lower is better)",
            [name for name in results["tasks"] if not higher_is_better(results["metric"][name])],
        ),
    ]
    groups = [(label, names) for label, names in groups if names]
    figure, axes = _figure(6.6, 2.9 * len(groups), len(groups))
    for ax, (label, names) in zip(axes, groups, strict=True):
        for name in names:
            _draw_task(ax, results, results["tasks"].index(name), name)
        ax.set_ylabel(label, fontsize=9)
        columns = [results["tasks"].index(name) for name in names]
        _limits(ax, [row[i] for row in results["scores"] for i in columns if row[i] is not None], least=0.1)
        _sequence_axis(ax, results)
        if len(results["tasks"]) <= MANY and ax.lines:
            ax.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return figure


def _draw_task(ax: Axes, results: dict, column: int, name: str) -> None:
    """Dashed until the task's own training (a large marker), solid from there on."""
    points = [(k, row[column]) for k, row in enumerate(results["scores"]) if row[column] is not None]
    own = trained_row(results, column)
    style = {
        "color": COLORS[column % len(COLORS)],
        "marker": MARKERS[column % len(MARKERS)],
        "markersize": 5 if len(results["tasks"]) <= MANY else 2,
    }
    before = [point for point in points if point[0] <= own]
    after = [point for point in points if point[0] >= own]
    if before:
        label = None if after else name
        ax.plot(*zip(*before, strict=True), label=label, linestyle="--", alpha=0.55, markerfacecolor="white", **style)
    if after:
        ax.plot(*zip(*after, strict=True), label=name, **style)
    if after and after[0][0] == own:
        ax.plot(*after[0], **{**style, "markersize": style["markersize"] * 1.8})


def draw_training(results: dict, steps: list[dict]) -> Figure | None:
    """Training loss of every step (of the last few in a long chain), each on its own axis."""
    trained = [step for step in steps if step.get("training", {}).get("curve")][-MANY:]
    if not trained:
        return None
    columns = 2 if len(trained) == 4 else min(len(trained), 3)
    rows = math.ceil(len(trained) / columns)
    figure, axes = _figure(6.6, 1.0 + 1.7 * rows, rows, columns)
    for ax in axes[len(trained) :]:
        ax.set_visible(False)
    for ax, step in zip(axes, trained, strict=False):
        points = [(row[0], row[1]) for row in step["training"]["curve"] if row[1] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLORS[0], linewidth=1.2)
        label = step["tasks"][0] if len(step["tasks"]) == 1 else "joint"
        ax.set_title(f"{step['position']} {label}", fontsize=9, loc="left")
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    return figure


FIGURES: dict[str, Callable[[dict, list[dict]], Any]] = {
    "score_matrix": draw_matrix,
    "perplexity": draw_perplexity,
    "tasks": draw_tasks,
    "training": draw_training,
}


# -- the page


def write_report(run: RunDirectory) -> str:
    """Write `report.html`, one page that needs no network; returns its path in the run.

    Raises:
        ReportError: no results yet.
    """
    results, steps = _load(run)
    config = run.read_bytes("config.yaml").decode()
    sections = [
        _header(results, steps),
        _section_numbers(results),
        _section_matrix(results),
        _section_histories(results),
        _section_extras(results),
        _section_curves(results, steps),
        _section_cost(results, steps),
        _section_gate(results.get("gate")),
        _section_ancestry(results, steps),
        f'<h2>Configuration</h2>\n<p class="soft">As resolved when the run started.</p>\n<pre>{escape(config)}</pre>',
        f"<footer>Written from {escape(run.uri)}. The numbers are those of results.json beside this page.</footer>",
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{results['run']} – continual learning report"), body="\n".join(filter(None, sections))
    )
    run.write_bytes("report.html", page.encode())
    return "report.html"


def _header(results: dict, steps: list[dict]) -> str:
    adapter, status = results["adapter"], results["status"]
    rank = f" of rank {adapter['r']}" if adapter.get("r") is not None else ""
    sequence = "".join(f"<li><code>{escape(name)}</code></li>" for name in results["tasks"])
    ended = f" · last step {_moment(steps[-1]['finished'])}" if steps else ""
    return (
        f"<h1>{escape(results['run'])} "
        f'<span class="status {escape(status)}">{escape(status)}</span></h1>\n'
        f'<p class="soft">{escape(str(results["base_model"]))} · adapter {escape(str(adapter["type"]))}{rank} · '
        f"strategy {escape(results['strategy'])}{ended}</p>\n"
        f'<ul class="sequence" aria-label="sequence of tasks">{sequence}</ul>\n'
        f'<p class="lead">{escape(story(results))}</p>'
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def story(results: dict) -> str:
    """The run in a few plain sentences."""
    count, done = len(results["tasks"]), sum(1 for step in results["steps"] if step["seconds"])
    how = "together, in one step" if is_joint(results) else "one after another"
    text = [f"{count} task{'s' if count > 1 else ''}, trained {how}." if count > 1 else "One task."]
    if results.get("start_from"):
        earlier = sum(row == 0 for row in results["learned_at"].values())
        text.append(f"The chain goes on from an earlier run, which had learned {earlier} of them.")
    if done < len(results["steps"]):
        text.append(f"{done} of {len(results['steps'])} steps are done so far.")
    if results["learning_accuracy"] is not None:
        text.append(f"Right after its own training a task scored {number(results['learning_accuracy'])} on average.")
    if results["nll_learning"] is not None:
        verb = "lowered" if results["nll_learning"] >= 0 else "raised"
        gain = number(abs(results["nll_learning"]))
        text.append(f"Training on a text task {verb} its loss by {gain} nats a token on average.")
    kept = [
        _kept(results["backward_transfer"], "the earlier tasks", "points of score"),
        _kept(results["nll_backward_transfer"], "the earlier text tasks", "nats a token"),
    ]
    if any(kept):
        text.append(f"By the end {' and '.join(filter(None, kept))}, on average.")
    ratio = results["perplexity_ratio"]
    if ratio is not None:
        change = 100 * (ratio - 1)
        verb = "rose" if change >= 0 else "fell"
        text.append(f"Perplexity on text that no task trains on {verb} by {abs(change):.1f}\u00a0%.")
    return " ".join(text)


def _kept(transfer: float | None, who: str, unit: str) -> str:
    if transfer is None:
        return ""
    return f"{who} had {'lost' if transfer < 0 else 'gained'} {number(abs(transfer))} {unit}"


def _section_numbers(results: dict) -> str:
    titles = {"learned": "What was learned", "forgotten": "What was forgotten", "cost": "What it cost"}
    items, parts = headlines(results), ["<h2>In numbers</h2>"]
    for group, title in titles.items():
        cards = "".join(
            f'<div class="card"><span>{escape(item.label)}</span><b>{escape(item.value)}</b>'
            f"<small>{escape(item.sentence)}</small></div>"
            for item in items
            if item.group == group
        )
        if cards:
            parts.append(f'<h3>{title}</h3>\n<div class="cards">{cards}</div>')
    return "\n".join(parts)


def _section_matrix(results: dict) -> str:
    tasks, shades = results["tasks"], _shades(results)
    text = (
        "<h2>Score matrix</h2>\n<p>Each row is a moment: the untouched base, then the model after every step. Each "
        "column is a task, scored on its test split. Brighter is better in every column; a frame marks the score "
        "right after the task's own training. Read a column downwards to see a task being forgotten. "
        f"{NONE} was not measured.</p>"
    )
    if len(tasks) > 4 * MANY:
        alt = f"Heat map of {len(results['scores'])} rows by {len(tasks)} tasks; the numbers are in results.json."
        return text + _image(draw_matrix(results, []), alt)
    head = "".join(
        f'<th scope="col">{escape(name)}<small>{escape(results["metric"][name])}<br>'
        f"{direction(results['metric'][name])}</small></th>"
        for name in tasks
    )
    body = [
        f'<tr><th scope="row">{escape(label)}</th>{_heat_cells(results, t, shades[t])}</tr>'
        for t, label in enumerate(row_labels(results))
    ]
    table = (
        f'<table class="heat"><thead><tr><th scope="col">after</th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
    )
    return f'{text}\n<div class="scroll">{table}</table></div>'


def _heat_cells(results: dict, t: int, shades: list[float | None]) -> str:
    cells = []
    for i, (value, shade) in enumerate(zip(results["scores"][t], shades, strict=True)):
        if value is None:
            cells.append(f'<td class="none">{NONE}</td>')
            continue
        ((background, ink),) = _colors([shade])
        own = ' class="own"' if trained_row(results, i) == t else ""
        cells.append(f'<td{own} style="background:{background};color:{ink};outline-color:{ink}">{number(value)}</td>')
    return "".join(cells)


def _section_histories(results: dict) -> str:
    rows = []
    for item in histories(results):
        cells = [number(value) for value in (item.majority, item.base, item.learned, item.best, item.final)]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        name = f'<th scope="row">{escape(item.name)}<small>{escape(item.metric)}</small></th>'
        rows.append(f"<tr>{name}{numbers}{_change_cell(item.change)}</tr>")
    headers = ("task", "majority", "base", "learned", "best", "final", "change")
    return (
        "<h2>Forgetting by task</h2>\n<p><b>Majority</b> is what always answering the commonest class scores, "
        "<b>base</b> the model before training, <b>learned</b> right after the task's own training, <b>best</b> the "
        "best from there on. <b>Change</b> is final against learned, negative = forgotten (for losses too).</p>\n"
        + _table(headers, rows)
    )


def _section_extras(results: dict) -> str:
    """What answers that the model writes score in the metrics beside the chosen one."""
    extras = results.get("extras") or {}
    if not extras:
        return ""
    rows = []
    for name, series in extras.items():
        for metric in next(filter(None, series)):
            values = [found.get(metric) if found else None for found in series]
            chosen = ", the task's metric" if metric == results["metric"][name] else ""
            title = f'<th scope="row">{escape(name)}<small>{escape(metric)}{chosen}</small></th>'
            rows.append(f"<tr>{title}{_cells(values, 3)}</tr>")
    return (
        "<h2>Written answers</h2>\n<p>What the model writes, against the reference: <b>rouge_l</b> by the longest "
        "common subsequence of words, <b>token_f1</b> by the words in common, <b>exact_match</b> by equality, the "
        "last two without case, punctuation and articles. Higher is better.</p>\n"
        + _table(("task", *row_labels(results)), rows)
    )


def _change_cell(change: float | None) -> str:
    if change is None or signed(change) == number(0):
        return f"<td>{signed(change)}</td>"
    kind, arrow = ("worse", "▼") if change < 0 else ("better", "▲")
    return f'<td class="{kind}">{arrow} {signed(change)}</td>'


def _table(headers: Sequence[str], rows: Sequence[str], foot: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>{foot}</table></div>'
    )


def _image(figure: Any, alt: str) -> str:
    data = base64.b64encode(_render(figure, "svg")).decode()
    return (
        f'<figure><div class="scroll"><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></div></figure>'
    )


def _section_curves(results: dict, steps: list[dict]) -> str:
    parts = [
        "<h2>Each task along the sequence</h2>\n<p>Dashed until a task is trained, solid afterwards. A line that "
        "falls (or rises, for a loss) after its large marker is forgetting.</p>",
        _image(draw_tasks(results, steps), _tasks_alt(results)),
    ]
    perplexity = draw_perplexity(results, steps)
    if perplexity is not None:
        parts.append(
            "<h2>General language</h2>\n<p>Perplexity on text that no task trains on. The dotted line is the base; a "
            "rise means that the adapter costs the model some of its general language.</p>"
        )
        parts += [_image(perplexity, _perplexity_alt(results)), _perplexity_table(results)]
    training = draw_training(results, steps)
    if training is not None:
        done = [step for step in steps if step["position"]]
        note = f" The last {MANY} of {len(done)} steps." if len(done) > MANY else ""
        parts.append(f"<h2>Training</h2>\n<p>Training loss of each step against its optimizer steps.{note}</p>")
        parts.append(_image(training, _training_alt(steps)))
    return "\n".join(parts)


def _tasks_alt(results: dict) -> str:
    changes = [f"{item.name} from {number(item.learned)} to {number(item.final)}" for item in histories(results)]
    return "Lines of each task's score after every step. From right after training to the end: " + "; ".join(changes)


def _perplexity_alt(results: dict) -> str:
    ends = [
        f"{name} from {number(values[0], 2)} to {number(values[-1], 2)}"
        for name, values in results["perplexity"].items()
    ]
    return "Perplexity after every step: " + "; ".join(ends)


def _training_alt(steps: list[dict]) -> str:
    ends = [
        f"{', '.join(step['tasks'])} ends at {number(step['training']['final_loss'])}"
        for step in steps
        if step.get("training")
    ]
    return "Training loss of every step: " + "; ".join(ends)


def _perplexity_table(results: dict) -> str:
    labels = row_labels(results)
    rows = []
    for name, values in results["perplexity"].items():
        losses = results["nll"].get(name, [])
        rows.append(f'<tr><th scope="row">{escape(name)}<small>perplexity</small></th>{_cells(values, 2)}</tr>')
        rows.append(f'<tr><th scope="row"><small>NLL, nats a token</small></th>{_cells(losses, 4)}</tr>')
    return _table(("corpus", *labels), rows)


def _cells(values: Iterable[float | None], digits: int) -> str:
    return "".join(f"<td>{number(value, digits)}</td>" for value in values)


def _section_cost(results: dict, steps: list[dict]) -> str:
    heads = any(step.get("head_parameters") for step in steps)
    headers = ["step", "total", "train", "evaluate", "overhead", "tokens/s", "peak memory", "adapter", "trainable"]
    rows = []
    for step in steps:
        seconds, speed = step["seconds"], step.get("training", {}).get("tokens_per_second")
        cells = [duration(seconds.get(name)) for name in ("total", "train", "evaluate", "overhead")]
        cells += [whole(speed), size(step.get("peak_memory_bytes")), size(step.get("adapter_bytes"))]
        cells += [whole(step.get(name)) for name in ("trainable_parameters", "head_parameters")[: 1 + heads]]
        label = "base" if not step["position"] else f"{step['position']} {_label(step)}"
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    total = [duration(results["seconds"].get(name)) for name in ("total", "train", "evaluate", "overhead")]
    foot = f'<tr><th scope="row">whole chain</th>{"".join(f"<td>{cell}</td>" for cell in total)}</tr>'
    return (
        "<h2>Cost</h2>\n<p><b>Overhead</b> is what was neither training nor evaluation: starting workers, loading the "
        "base, publishing. <b>Peak memory</b> is the largest of all workers.</p>\n"
        + _table([*headers, "heads"] if heads else headers, rows, foot)
    )


def _label(step: dict) -> str:
    return step["tasks"][0] if len(step["tasks"]) == 1 else "joint"


def _section_gate(gate: dict | None) -> str:
    if not gate:
        return ""
    verdict = "passed" if gate["passed"] else "failed"
    reasons = gate["reasons"] or ["every limit is kept"]
    items = "".join(f"<li>{escape(str(reason))}</li>" for reason in reasons)
    return (
        f'<h2>Gate <span class="status {verdict}">{verdict}</span></h2>\n'
        f"<p>The limits that the configuration sets, held against this chain.</p>\n<ul>{items}</ul>"
    )


def _section_ancestry(results: dict, steps: list[dict]) -> str:
    items = []
    for step in steps:
        facts = _base_facts(results, step) if step["position"] == 0 else _step_facts(step)
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in facts)
        title = "base" if step["position"] == 0 else f"{step['position']} {_label(step)}"
        kind = ' class="base"' if step["position"] == 0 else ""
        items.append(f"<li{kind}><b>{escape(title)}</b><dl>{pairs}</dl></li>")
    return (
        "<h2>Ancestry</h2>\n<p>Which adapter grew from which, on which data. A fingerprint covers the base, the "
        "parent step, every setting and the training data: equal fingerprints mean the same recipe.</p>\n"
        f'<ol class="chain">{"".join(items)}</ol>'
    )


def _base_facts(results: dict, step: dict) -> list[tuple[str, str]]:
    return [("model", escape(str(results["base_model"]))), ("fingerprint", _code(step["fingerprint"]))]


def _step_facts(step: dict) -> list[tuple[str, str]]:
    """Names and escaped HTML."""
    facts = [("fingerprint", _code(step["fingerprint"])), ("grown from", _code(step["parent"]))]
    for name, splits in step.get("data", {}).items():
        train = splits["train"]
        facts.append(("trained on", f"{escape(name)}, {train['rows']:,} rows, digest {_code(train['digest'])}"))
    setting = step.get("setting", {})
    adapter, training = setting.get("adapter", {}), setting.get("training", {})
    words = [
        f"adapter {adapter.get('type')}, rank {adapter.get('r')}, selection {adapter.get('selection')}",
        f"strategy {setting.get('strategy', {}).get('name')}",
        f"learning rate {training.get('learning_rate')}, batch {training.get('batch_size')}",
        f"seed {training.get('seed')}",
        f"{whole(step.get('training', {}).get('steps'))} optimizer steps",
    ]
    facts.append(("setting", escape("; ".join(words))))
    environment = step.get("environment", {})
    facts.append(("environment", escape(", ".join(f"{key} {value}" for key, value in environment.items()))))
    facts.append(("finished", _moment(step["finished"])))
    return facts


def _code(value: str | None) -> str:
    return f"<code>{escape(value)}</code>" if value else NONE
