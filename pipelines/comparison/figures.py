"""Figures of a comparison: learning against forgetting, and learning against the number of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipelines.comparison.methods import EXAMPLES_MARK
from pipelines.reporting.drawing import new_figure, render, series_style

METRIC_GROUPS = (  # learning, its key; forgetting, its key; the sign that makes forgetting positive
    ("learning accuracy", "learning_accuracy", "forgetting", "forgetting", 1),
    ("NLL learning, nats per token", "nll_learning", "NLL forgetting, nats per token", "nll_backward_transfer", -1),
)


def tradeoff_figure(result: dict) -> bytes:
    """PNG: learning to the right, forgetting upwards (the best is at the lower right), one panel per group of metrics.

    The dashed line joins the methods that no other method beats in both (the Pareto front).
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
    """The points (learning, forgetting) that no other point beats in both, by increasing learning."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _label(axis, points: dict[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, moved up where it would overlap another name."""
    axis.figure.draw_without_rendering()  # text has no position before that
    placed: list = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        text = axis.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        for higher in range(4, 100, 2):
            text.xyann = (5, higher)
            if not any(text.get_window_extent().overlaps(other) for other in placed):
                break
        placed.append(text.get_window_extent())


def examples_figure(result: dict) -> bytes:
    """PNG: learning against the number of training examples per task, one line per method and one panel per group."""

    def draw(axis, learning, key, *_) -> None:
        lines: dict[str, list] = {}
        for name, summary in result["methods"].items():
            base, _, examples = name.partition(EXAMPLES_MARK)
            if summary[key][0] is not None:
                lines.setdefault(base, []).append((int(examples), *summary[key]))
        for index, (base, points) in enumerate(lines.items()):
            x, y, errors = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=[e or 0 for e in errors], capsize=2, label=base, **series_style(index))
        axis.set(xscale="log", xlabel="training examples per task", ylabel=f"{learning} →")
        if lines:
            counts = sorted({point[0] for points in lines.values() for point in points})
            axis.set_xticks(counts, [f"{count:,}" for count in counts])
            axis.minorticks_off()
            axis.legend(fontsize=8, frameon=False)

    return _panels(result, draw)


def _panels(result: dict, draw: Callable) -> bytes:
    """A figure with one panel per group of metrics that some method has, drawn by `draw(axis, *group)`."""
    methods = result["methods"].values()
    shown = [group for group in METRIC_GROUPS if any(m[group[1]][0] is not None for m in methods)]
    shown = shown or METRIC_GROUPS[:1]
    figure, axes = new_figure(7 * len(shown), 5, columns=len(shown))
    for axis, group in zip(axes, shown, strict=True):
        draw(axis, *group)
    return render(figure)


def _point(summary: dict, x: str, y: str, sign: int) -> tuple | None:
    (x_mean, x_error), (y_mean, y_error) = summary[x], summary[y]
    return None if x_mean is None or y_mean is None else ((x_mean, x_error), (sign * y_mean, y_error))
