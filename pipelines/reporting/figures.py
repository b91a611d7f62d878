"""The figures of a run, for files and for the report page, drawn from its results and steps.

Colours are safe for any colour vision, and every series has its own marker. Heat maps use viridis, whose order is
also visible in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.metrics.score_matrix import higher_is_better
from pipelines.reporting.drawing import COLORS, MARKERS, axis_limits, colors, new_figure
from pipelines.reporting.formatting import number
from pipelines.reporting.summary import MANY, direction, goodness, row_labels, trained_row
from pipelines.runs.results import Results
from pipelines.runs.step_record import StepRecord, Validated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def shading(results: Results) -> list[list[float | None]]:
    """Goodness of every cell, by row."""
    columns = [
        goodness([row[column] for row in results.scores], results.metric[name])
        for column, name in enumerate(results.tasks)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def draw_matrix(results: Results, _steps: Sequence[StepRecord]) -> Figure:
    """The score matrix as a heat map; brighter is better in every column."""
    labels, tasks, shades = row_labels(results), results.tasks, shading(results)
    few = len(tasks) <= MANY
    scale = 1.0 if few else 0.16
    figure, (ax,) = new_figure(2.2 + max(1.25 * scale * len(tasks), 3), 1.3 + max(0.42 * scale * len(labels), 1))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    values = [[math.nan if value is None else value for value in row] for row in shades]
    ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    if few:
        _write_numbers(ax, results, shades)
        headers = [f"{name}\n{results.metric[name]}\n({direction(results.metric[name])})" for name in tasks]
        ax.set_xticks(range(len(tasks)), headers, fontsize=8)
        ax.set_yticks(range(len(labels)), labels)
    ax.xaxis.set_ticks_position("top")
    ax.tick_params(length=0)
    ax.set_ylabel("after step" if few else "after step number")
    ax.set_title("Score of each task (columns) after every step (rows); brighter is better", fontsize=10)
    return figure


def _write_numbers(ax: Axes, results: Results, shades: list[list[float | None]]) -> None:
    from matplotlib.patches import Rectangle  # slow

    for t, row in enumerate(results.scores):
        for i, value in enumerate(row):
            text = "#55606e" if value is None else colors([shades[t][i]])[0][1]
            own = trained_row(results, i) == t
            ax.text(i, t, number(value), ha="center", va="center", color=text, weight="bold" if own else "normal")
            if own and value is not None:
                ax.add_patch(Rectangle((i - 0.47, t - 0.44), 0.94, 0.88, fill=False, edgecolor=text, linewidth=1.5))


def draw_perplexity(results: Results, _steps: Sequence[StepRecord]) -> Figure | None:
    """Perplexity on each retention corpus along the sequence, one panel per corpus."""
    series = {name: values for name, values in results.perplexity.items() if any(v is not None for v in values)}
    if not series:
        return None
    columns = min(len(series), 2)
    rows = math.ceil(len(series) / columns)
    figure, axes = new_figure(6.6, 2.7 * rows, rows, columns)
    for ax in axes[len(series) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes, series.items(), strict=False):
        points = [(k, value) for k, value in enumerate(values) if value is not None]
        ax.axhline(points[0][1], color="#55606e", linewidth=1, linestyle=":")
        ax.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", markersize=5)
        axis_limits(ax, [value for _, value in points], least=0.05 * points[0][1])
        ax.set_title(f"{name}: {points[0][1]:.2f} → {points[-1][1]:.2f}", fontsize=10, loc="left")
        _sequence_axis(ax, results)
    figure.supylabel("perplexity (lower is better)", fontsize=9)
    return figure


def _sequence_axis(ax: Axes, results: Results) -> None:
    labels = row_labels(results)
    if len(labels) <= MANY:
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 4 else {}
        ax.set_xticks(range(len(labels)), labels, fontsize=8, **slant)
    else:
        ax.set_xlabel("position in the sequence", fontsize=9)
    ax.set_xlim(-0.3, len(labels) - 0.7)


def draw_tasks(results: Results, _steps: Sequence[StepRecord]) -> Figure | None:
    """Each task's score along the sequence: scores in [0, 1] in one panel, NLL in another."""
    groups = [
        (
            "score (higher is better)",
            [name for name in results.tasks if higher_is_better(results.metric[name])],
        ),
        (
            "NLL, nats per token (lower is better)",
            [name for name in results.tasks if not higher_is_better(results.metric[name])],
        ),
    ]
    groups = [(label, names) for label, names in groups if names]
    figure, axes = new_figure(6.6, 2.9 * len(groups), len(groups))
    for ax, (label, names) in zip(axes, groups, strict=True):
        for name in names:
            _draw_task(ax, results, results.tasks.index(name), name)
        ax.set_ylabel(label, fontsize=9)
        columns = [results.tasks.index(name) for name in names]
        axis_limits(ax, [row[i] for row in results.scores for i in columns if row[i] is not None], least=0.1)
        _sequence_axis(ax, results)
        if len(results.tasks) <= MANY and ax.lines:
            ax.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return figure


def _draw_task(ax: Axes, results: Results, column: int, name: str) -> None:
    """Draw a task's line: dashed up to its own training (a large marker), solid afterwards."""
    points = [(k, row[column]) for k, row in enumerate(results.scores) if row[column] is not None]
    own = trained_row(results, column)
    style = {
        "color": COLORS[column % len(COLORS)],
        "marker": MARKERS[column % len(MARKERS)],
        "markersize": 5 if len(results.tasks) <= MANY else 2,
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


def draw_training(results: Results, steps: Sequence[StepRecord]) -> Figure | None:
    """Training loss of every step, or of the last `MANY`, one panel per step; with the loss on validation rows."""
    trained = [step for step in steps if step.curve][-MANY:]
    if not trained:
        return None
    columns = 2 if len(trained) == 4 else min(len(trained), 3)
    rows = math.ceil(len(trained) / columns)
    figure, axes = new_figure(6.6, 1.0 + 1.7 * rows, rows, columns)
    for ax in axes[len(trained) :]:
        ax.set_visible(False)
    for ax, step in zip(axes, trained, strict=False):
        points = [(row[0], row[1]) for row in step.curve if row[1] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), color=COLORS[0], linewidth=1.2)
        if step.training.validation:
            _draw_validation(ax, step.training.validation)
        ax.set_title(f"{step.position} {step.label}", fontsize=9, loc="left")
    figure.supxlabel("optimizer step", fontsize=9)
    validated = any(step.training.validation for step in trained)
    figure.supylabel("loss (line: training, dots: validation)" if validated else "training loss", fontsize=9)
    return figure


def _draw_validation(ax: Axes, validation: Validated) -> None:
    """Draw the validation losses; the state that was kept has a large marker."""
    points = [(step, loss) for step, loss, _ in validation.curve]
    ax.plot(*zip(*points, strict=True), color=COLORS[1], linestyle=":", marker="o", markersize=3)
    ax.plot(validation.best_step, validation.best_loss, color=COLORS[1], marker="o", markersize=7)


FIGURES: dict[str, Callable[[Results, Sequence[StepRecord]], Any]] = {
    "score_matrix": draw_matrix,
    "perplexity": draw_perplexity,
    "tasks": draw_tasks,
    "training": draw_training,
}
