"""Figures of a comparison: learning against forgetting, and learning against the number of examples."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

from pipelines.comparison.methods import AT

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
    import matplotlib  # slow

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
