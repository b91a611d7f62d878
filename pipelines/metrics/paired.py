"""Paired tests and intervals: McNemar, sign flips, bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test: p-value that two paired lists of outcomes are equally often right."""
    wins = sum(a and not b for a, b in zip(first, second, strict=True))
    losses = sum(b and not a for a, b in zip(first, second, strict=True))
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


FLIPS = 9999

FLIP_NUMBERS = 1 << 22  # signs drawn at a time


# -- paired tests
def worse(champion: Sequence[dict], candidate: Sequence[dict]) -> tuple[float, str]:
    """(p, name of the test) that the candidate is worse on the same examples only by accident."""
    if len(champion) != len(candidate) or [o["id"] for o in champion] != [o["id"] for o in candidate]:
        raise ValueError("the outcomes are of different examples")
    if "nll" in champion[0]:
        return sign_flip([b["nll"] - a["nll"] for a, b in zip(champion, candidate, strict=True)]), "sign-flip test"
    if "score" in champion[0]:
        return sign_flip([a["score"] - b["score"] for a, b in zip(champion, candidate, strict=True)]), "sign-flip test"
    lost = sum(a["correct"] and not b["correct"] for a, b in zip(champion, candidate, strict=True))
    gained = sum(b["correct"] and not a["correct"] for a, b in zip(champion, candidate, strict=True))
    return mcnemar_worse(lost, gained), "exact McNemar test"


def mcnemar_worse(lost: int, gained: int) -> float:
    """P(X ≥ lost) for X ~ Binomial(lost + gained, ½).

    Args:
        lost, gained: examples that only the champion, or only the candidate, had right.
    """
    n = lost + gained
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n


def sign_flip(losses: Sequence[float], seed: int = 0) -> float:
    """One-sided permutation test of paired losses: under "no difference" the sign of each is a coin's.

    Their sum is compared with those of 9,999 random choices of signs; the observed one counts too.
    """
    values = np.asarray(losses, dtype=np.float64)
    values = values[values != 0]
    observed = values.sum() - 1e-12 * np.abs(values).sum()  # sums in another order may differ in the last digit
    generator, extreme, left = np.random.default_rng(seed), 0, FLIPS
    while left:
        rows = min(left, max(1, FLIP_NUMBERS // max(1, len(values))))
        signs = generator.integers(0, 2, size=(rows, len(values)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((signs @ values >= observed).sum())
        left -= rows
    return (1 + extreme) / (1 + FLIPS)


RESAMPLES = 2000


def mean_and_error(values: Sequence[float]) -> list[float | None]:
    """[mean, standard error of the mean]; the error is None for one value, both for none."""
    if not values:
        return [None, None]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return [mean, None]
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [mean, math.sqrt(variance / len(values))]


def bootstrap(parts: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> dict | None:
    """Mean over tasks of weighted means over examples, and its 95 % percentile interval.

    Args:
        parts: (values, weights) of each task.
    """
    if not parts:
        return None
    generator = np.random.default_rng(seed)
    draws = np.zeros(RESAMPLES)
    for values, weights in parts:
        chosen = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
        draws += (values * weights)[chosen].sum(1) / weights[chosen].sum(1)
    draws /= len(parts)
    mean = float(np.mean([np.average(values, weights=weights) for values, weights in parts]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}
