"""The figures of a run and of an ancestry, for files and for the page. Drawn from results, steps and links alone.

Colours are told apart with any colour vision, and every series has a marker of its own; heat maps use viridis, whose
order shows in grey too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.ancestry import Ancestry, Link
from pipelines.config import ConfigError, Problem
from pipelines.metrics import higher_is_better
from pipelines.summary import MANY, direction, goodness, number, row_labels, trained_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours (told apart with any colour vision), without the yellow that vanishes on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"


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


def render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # Without a date and with fixed ids the same run gives the same file.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "curlora"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def colors(values: Iterable[float]) -> list[tuple[str, str]]:
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


def shading(results: dict) -> list[list[float | None]]:
    """Goodness of every cell, by row."""
    columns = [
        goodness([row[column] for row in results["scores"]], results["metric"][name])
        for column, name in enumerate(results["tasks"])
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def draw_matrix(results: dict, _steps: list[dict]) -> Figure:
    """The score matrix as a heat map, every column in its own direction."""
    labels, tasks, shades = row_labels(results), results["tasks"], shading(results)
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
            text = "#55606e" if value is None else colors([shades[t][i]])[0][1]
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


# -- ancestry

CARDS = 12  # more adapters than this are drawn as a dense grid
GRID_ROWS, GRID_COLUMNS = 25, 4  # at least, at most
LINE = 0.2  # inches
SHOWN_SETTINGS = ("adapter.type", "adapter.r", "strategy.name", "training.learning_rate")


def write_ancestry(ancestry: Ancestry, path: Path) -> None:
    """Draw an ancestry to a .png, .svg or .pdf file.

    Raises:
        ConfigError: another kind of file.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ConfigError([Problem("--figure", f"'{path.name}' is no .png, .svg or .pdf file; choose one of them")])
    path.write_bytes(render(draw_ancestry(ancestry), kind))


def draw_ancestry(ancestry: Ancestry) -> Figure:
    """From the base down to one adapter: cards with data and scores, or a dense grid for a long chain."""
    if len(ancestry.links) <= CARDS + 1:
        return _draw_cards(ancestry)
    return _draw_grid(ancestry)


def _empty(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes in inches from the upper left corner, without anything in them."""
    figure, (ax,) = _figure(width, height)
    ax.grid(False)
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(height, 0))
    return figure, ax


def _draw_cards(ancestry: Ancestry) -> Figure:
    cards = [_card(ancestry, index) for index in range(len(ancestry.links))]
    heights = [0.34 + LINE * len(lines) for lines in cards]
    figure, ax = _empty(6.0, sum(heights) + 0.1)
    tops = [sum(heights[:index]) + 0.2 for index in range(len(heights))]
    ax.plot([0.2, 0.2], [tops[0], tops[-1]], color="#9aa5b1", linewidth=2, zorder=1)
    for link, lines, top in zip(ancestry.links, cards, tops, strict=True):
        ax.plot(0.2, top, zorder=2, **_dot(ancestry, link, 9))
        ax.text(0.42, top, link.title, va="center", fontsize=10, weight="bold")
        for row, line in enumerate(lines, 1):
            ax.text(0.42, top + LINE * row, line, va="center", fontsize=8.5, color="#3c4654")
    return figure


def _card(ancestry: Ancestry, index: int) -> list[str]:
    """The lines under a link's name: run, data, settings where they change, scores of its own tasks."""
    link, above = ancestry.links[index], ancestry.links[max(index - 1, 0)]
    lines = [ancestry.base_model] if link.is_base else []
    if index and link.run_uri != above.run_uri and not above.is_base:
        lines.append(f"run {link.run_uri}")
    lines += [f"{task}: {data['rows']:,} rows, digest {data['digest'][:12]}" for task, data in link.data.items()]
    new = {key: link.settings.get(key) for key in SHOWN_SETTINGS if link.settings.get(key) != above.settings.get(key)}
    if new:
        lines.append(", ".join(f"{key} {value}" for key, value in new.items()))
    scores = [f"{name} {value:.3f}" for name, value in own_scores(link).items()]
    return [_short(line) for line in [*lines, *([", ".join(scores)] if scores else [])]]


def _short(line: str, limit: int = 88) -> str:
    return line if len(line) <= limit else f"{line[: limit // 2]}…{line[-limit // 2 :]}"


def own_scores(link: Link) -> dict[str, float]:
    """Scores of what a step learned, and the perplexity on retained text after it."""
    wanted = [f"score/{task}" for task in link.tasks]
    wanted += [name for name in link.scores if name.startswith("perplexity/")]
    return {name: link.scores[name] for name in wanted if name in link.scores}


def _dot(ancestry: Ancestry, link: Link, size: float) -> dict:
    """A square for the base, a circle for a step; another colour and form for steps of an earlier run."""
    if link.is_base:
        return {"marker": "s", "color": "#55606e", "markersize": size}
    if link.run_uri != ancestry.links[-1].run_uri:
        return {"marker": "D", "color": COLORS[1], "markersize": size * 0.85}
    return {"marker": "o", "color": COLORS[0], "markersize": size}


def _draw_grid(ancestry: Ancestry) -> Figure:
    """Column by column, a line each; a link's number is its place in the whole ancestry."""
    from matplotlib.collections import LineCollection

    count = len(ancestry.links)
    rows = max(GRID_ROWS, math.ceil(count / GRID_COLUMNS))
    figure, ax = _empty(6.6, LINE * min(rows, count) + 0.3)
    places = [(1.65 * (k // rows) + 0.15, LINE * (k % rows) + 0.2) for k in range(count)]
    lines = [places[start : start + rows] for start in range(0, count, rows)]
    ax.add_collection(LineCollection(lines, colors="#9aa5b1", linewidths=1.2, zorder=1))
    for place, (link, (x, y)) in enumerate(zip(ancestry.links, places, strict=True)):
        ax.plot(x, y, zorder=2, **_dot(ancestry, link, 4.5))
        own = next((f"  {v:.3f}" for name, v in own_scores(link).items() if name.startswith("score/")), "")
        ax.text(x + 0.12, y, f"{place} {_short(link.label, 16)}{own}", va="center", fontsize=7)
    return figure
