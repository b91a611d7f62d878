"""Pure functions of the score matrix. `scores[t][i]` is the score on task i after step t; row 0 is the untouched base.

Cells that were not measured are None. Metrics in [0, 1] (accuracy, macro-F1) and negative log-likelihoods have
separate aggregates; an aggregate that is not defined is None (one task has no transfer). Definitions: Lopez-Paz &
Ranzato 2017 (transfer), Chaudhry et al. 2018 (forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Matrix = Sequence[Sequence[float | None]]

# per column: the first row after its task was trained; 0 for tasks learned before the chain began
Rows = Sequence[int] | None

LOWER_IS_BETTER = frozenset({"nll"})


def higher_is_better(metric: str) -> bool:
    """Direction of a task's metric. Those where higher is better lie in [0, 1] and share the accuracy aggregates."""
    return metric not in LOWER_IS_BETTER


def gain(before: float | None, after: float | None, metric: str) -> float | None:
    """How much better `after` is than `before`, positive = better for either direction of the metric."""
    return _minus(after, before) if higher_is_better(metric) else _minus(before, after)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean; None if there is nothing to average or a value is missing."""
    values = list(values)
    if not values or any(value is None for value in values):
        return None
    return math.fsum(values) / len(values)


def average_score(scores: Matrix, columns: Sequence[int]) -> float | None:
    """mean_i R[T][i]."""
    return mean(scores[-1][i] for i in columns)


def learning_score(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_i R[i][i]: how well each task was learned at the time."""
    rows = _rows(scores, rows)
    return mean(scores[rows[i]][i] for i in columns if rows[i]) if rows else None


def backward_transfer(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_{i<T} (R[T][i] − R[i][i]); negative = forgetting (for scores where higher is better)."""
    rows, last = _rows(scores, rows), len(scores) - 1
    return mean(_minus(scores[last][i], scores[rows[i]][i]) for i in columns if rows[i] < last) if rows else None


def forgetting(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_{i<T} (max_{i≤t<T} R[t][i] − R[T][i]); the maximum is over the rows in which the task was scored.

    None where R[i][i] is not known.
    """
    rows, last = _rows(scores, rows), len(scores) - 1
    drops = []
    for i in columns if rows else ():
        if rows[i] < last:
            history = [scores[t][i] for t in range(rows[i], last)]
            best = max((score for score in history if score is not None), default=None)
            drops.append(None if history[0] is None else _minus(best, scores[last][i]))
    return mean(drops)


def forward_transfer(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_{i≥2} (R[i−1][i] − R[0][i]) over the tasks that have a score before training."""
    rows = _rows(scores, rows)
    gains = [_minus(scores[rows[i] - 1][i], scores[0][i]) for i in columns if rows[i] >= 2] if rows else []
    return mean(gain for gain in gains if gain is not None)


def nll_learning(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_i (R[0][i] − R[i][i]): drop in nats per token of each text task by its own training."""
    rows = _rows(scores, rows)
    return mean(_minus(scores[0][i], scores[rows[i]][i]) for i in columns if rows[i]) if rows else None


def nll_backward_transfer(scores: Matrix, columns: Sequence[int], rows: Rows = None) -> float | None:
    """mean_{i<T} (R[i][i] − R[T][i]): negative = forgetting, as for the other metrics."""
    rows, last = _rows(scores, rows), len(scores) - 1
    return mean(_minus(scores[rows[i]][i], scores[last][i]) for i in columns if rows[i] < last) if rows else None


def perplexity(nll: float | None) -> float | None:
    """exp(NLL), capped below the largest float."""
    return None if nll is None else math.exp(min(nll, 700.0))


def perplexity_ratio(nll_by_corpus: dict[str, Sequence[float | None]]) -> float | None:
    """Geometric mean over the retention corpora of perplexity after / before."""
    rises = [_minus(series[-1], series[0]) for series in nll_by_corpus.values()]
    rise = mean(rises)
    return perplexity(rise)


def aggregates(
    scores: Matrix, metrics: Sequence[str], nll_by_corpus: dict[str, Sequence[float | None]], rows: Rows = None
) -> dict:
    """Every aggregate of a run.

    Args:
        scores: (T + 1) rows of T cells; under `joint` two rows.
        metrics: metric of each column; `nll` columns are aggregated separately from those in [0, 1].
        nll_by_corpus: retention NLL of every row.
        rows: see `Rows`.
    """
    bounded = [i for i, metric in enumerate(metrics) if higher_is_better(metric)]
    text = [i for i, metric in enumerate(metrics) if not higher_is_better(metric)]
    return {
        "average_accuracy": average_score(scores, bounded),
        "learning_accuracy": learning_score(scores, bounded, rows),
        "backward_transfer": backward_transfer(scores, bounded, rows),
        "forward_transfer": forward_transfer(scores, bounded, rows),
        "forgetting": forgetting(scores, bounded, rows),
        "perplexity_ratio": perplexity_ratio(nll_by_corpus),
        "nll_average": average_score(scores, text),
        "nll_learning": nll_learning(scores, text, rows),
        "nll_backward_transfer": nll_backward_transfer(scores, text, rows),
    }


def _rows(scores: Matrix, rows: Rows) -> Rows:
    """The given rows; without them 1 … T for T columns, and None under `joint`, which has two rows and no order."""
    if rows is None and len(scores) == len(scores[0]) + 1:
        return range(1, len(scores))
    return rows


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
