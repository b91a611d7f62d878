"""Fronts of learning and forgetting over learning rates: what a method forgets at one and the same learning.

A method that learns little forgets little, so two methods at one rate each say nothing about which is better. Here
every method is trained at every rate of a grid, and its forgetting is read off where it learns as much as the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from pipelines.comparison.figures import METRIC_GROUPS, pareto_front
from pipelines.comparison.methods import RATE_MARK
from pipelines.metrics.paired import mean_and_error
from pipelines.runs.results import Results

SHARE = 0.95
"""Part of the best learning of the reference at which methods are compared."""


class Point(NamedTuple):
    """A run: its learning and its forgetting (positive: forgotten), accuracies or nats per token."""

    learning: float
    forgetting: float


def forgetting_at(points: Sequence[tuple[float, float]], learning: float) -> float | None:
    """Least forgetting of a method that learns as much, by linear interpolation along its front.

    At less learning than that of its gentlest point, that point counts: a user may always take it. None if the method
    never learns as much.
    """
    front = pareto_front(points)
    if not front or learning > front[-1][0]:
        return None
    if learning <= front[0][0]:
        return front[0][1]
    for (x0, y0), (x1, y1) in pairwise(front):
        if learning <= x1:
            return y0 + (y1 - y0) * (learning - x0) / (x1 - x0)
    return None


def points_by_method(outcomes: Mapping[str, Mapping[int, Results]]) -> dict[str, dict[int, list[Point]]]:
    """Method without its rate → seed → one point per rate; of text, if no task has an accuracy."""
    points: dict[str, dict[int, list[Point]]] = {}
    for name, runs in outcomes.items():
        method, mark, _ = name.partition(RATE_MARK)
        for seed, results in runs.items() if mark else ():
            for _, learning, _, forgetting, sign in METRIC_GROUPS:
                x, y = getattr(results, learning), getattr(results, forgetting)
                if x is not None and y is not None:
                    points.setdefault(method, {}).setdefault(seed, []).append(Point(x, sign * y))
                    break
    return points


def fronts(outcomes: Mapping[str, Mapping[int, Results]], reference: str) -> dict | None:
    """`{"reference", "learning", "methods": {name: {"best": [mean, error], "forgetting": [mean, error], "seeds"}}}`.

    The learning is SHARE of the best mean learning of the reference, means and standard errors are over seeds;
    `seeds` counts those that reach that learning. None if no method was trained at several rates.

    Args:
        outcomes: name with rate → seed → results of the finished run.
        reference: method without a rate; the first one, if it has no finished run.
    """
    points = points_by_method(outcomes)
    if not points:
        return None
    reference = reference.partition(RATE_MARK)[0]
    reference = reference if reference in points else next(iter(points))
    best = {name: mean_and_error([max(seen)[0] for seen in by_seed.values()]) for name, by_seed in points.items()}
    target = SHARE * best[reference][0]
    methods = {}
    for name, by_seed in points.items():
        forgotten = [value for seen in by_seed.values() if (value := forgetting_at(seen, target)) is not None]
        methods[name] = {"best": best[name], "forgetting": mean_and_error(forgotten), "seeds": len(forgotten)}
    return {"reference": reference, "learning": target, "methods": methods}
