"""Draws the ancestry of an adapter, from the base model through every step that led to it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ConfigError, Problem
from pipelines.lineage.ancestry import Ancestry, Link, rows_in_words
from pipelines.reporting.drawing import COLORS, new_figure, render
from pipelines.reporting.formatting import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARDS = 12  # a chain with more adapters is drawn as a dense grid
GRID_ROWS, GRID_COLUMNS = 25, 4  # at least so many rows, at most so many columns
LINE = 0.2  # line height in inches
SHOWN_SETTINGS = ("adapter.type", "adapter.r", "strategy.name", "training.learning_rate")


def write_ancestry(ancestry: Ancestry, path: Path) -> None:
    """Draw an ancestry to a .png, .svg or .pdf file.

    Raises:
        ConfigError: another file format.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ConfigError([Problem("--figure", f"'{path.name}' is not a .png, .svg or .pdf file; choose one of them")])
    path.write_bytes(render(draw_ancestry(ancestry), kind))


def draw_ancestry(ancestry: Ancestry) -> Figure:
    """Draw the ancestry as cards with data and scores, or a long one as a dense grid."""
    if len(ancestry.links) <= CARDS + 1:
        return _draw_cards(ancestry)
    return _draw_grid(ancestry)


def _empty(width: float, height: float) -> tuple[Figure, Axes]:
    """Empty axes, in inches from the upper left corner."""
    figure, (ax,) = new_figure(width, height)
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
    """Lines below a link's name: its run, data, changed settings and the scores of its own tasks."""
    link, above = ancestry.links[index], ancestry.links[max(index - 1, 0)]
    lines = [ancestry.base_model] if link.is_base else []
    if index and link.run_uri != above.run_uri and not above.is_base:
        lines.append(f"run {link.run_uri}")
    lines += [f"imported from {link.origin}"] if link.origin else []
    lines += [f"{task}: {rows_in_words(data)}, digest {data['digest'][:12]}" for task, data in link.data.items()]
    new = {key: link.settings.get(key) for key in SHOWN_SETTINGS if link.settings.get(key) != above.settings.get(key)}
    if new:
        lines.append(", ".join(f"{key} {value}" for key, value in new.items()))
    scores = [f"{name} {number(value)}" for name, value in own_scores(link).items()]
    return [_short(line) for line in [*lines, *([", ".join(scores)] if scores else [])]]


def _short(line: str, limit: int = 88) -> str:
    return line if len(line) <= limit else f"{line[: limit // 2]}…{line[-limit // 2 :]}"


def own_scores(link: Link) -> dict[str, float]:
    """Scores of a step on its own tasks, and the perplexity on retention corpora after it."""
    wanted = [f"score/{task}" for task in link.tasks]
    wanted += [name for name in link.scores if name.startswith("perplexity/")]
    return {name: link.scores[name] for name in wanted if name in link.scores}


def _dot(ancestry: Ancestry, link: Link, size: float) -> dict:
    """A square for the base, a circle for a step; a diamond in another colour for a step of an earlier run."""
    if link.is_base:
        return {"marker": "s", "color": "#55606e", "markersize": size}
    if link.run_uri != ancestry.links[-1].run_uri:
        return {"marker": "D", "color": COLORS[1], "markersize": size * 0.85}
    return {"marker": "o", "color": COLORS[0], "markersize": size}


def _draw_grid(ancestry: Ancestry) -> Figure:
    """One line per step, column by column, numbered by its position in the whole ancestry."""
    from matplotlib.collections import LineCollection  # slow

    count = len(ancestry.links)
    rows = max(GRID_ROWS, math.ceil(count / GRID_COLUMNS))
    figure, ax = _empty(6.6, LINE * min(rows, count) + 0.3)
    positions = [(1.65 * (k // rows) + 0.15, LINE * (k % rows) + 0.2) for k in range(count)]
    lines = [positions[start : start + rows] for start in range(0, count, rows)]
    ax.add_collection(LineCollection(lines, colors="#9aa5b1", linewidths=1.2, zorder=1))
    for index, (link, (x, y)) in enumerate(zip(ancestry.links, positions, strict=True)):
        ax.plot(x, y, zorder=2, **_dot(ancestry, link, 4.5))
        own = next((f"  {number(v)}" for name, v in own_scores(link).items() if name.startswith("score/")), "")
        ax.text(x + 0.12, y, f"{index} {_short(link.label, 16)}{own}", va="center", fontsize=7)
    return figure
