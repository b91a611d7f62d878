"""Paired tests and bootstrap intervals over test examples.

scipy.stats takes a second to import, which only a verdict or a comparison should pay; hence the imports in functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIGN_CHOICES = 9999
SIGNS_PER_BATCH = 1 << 22
RESAMPLES = 2000
RESAMPLES_PER_BATCH = 100


def paired_p_value(champion: Sequence[dict], candidate: Sequence[dict]) -> tuple[float, str]:
    """(p-value against the null hypothesis that the candidate is no worse than the champion, name of the test).

    Args:
        champion, candidate: outcomes on the same examples in the same order. Those with `nll` (per example, in nats)
            or `score` get a sign-flip test, those that are only `correct` or not an exact McNemar test.

    Raises:
        ValueError: the outcomes are of different examples.
    """
    if len(champion) != len(candidate) or [o["id"] for o in champion] != [o["id"] for o in candidate]:
        raise ValueError("the outcomes are of different examples")
    pairs = list(zip(champion, candidate, strict=True))
    if "nll" in champion[0]:
        return sign_flip([b["nll"] - a["nll"] for a, b in pairs]), "sign-flip test"
    if "score" in champion[0]:
        return sign_flip([a["score"] - b["score"] for a, b in pairs]), "sign-flip test"
    lost = sum(a["correct"] and not b["correct"] for a, b in pairs)
    gained = sum(b["correct"] and not a["correct"] for a, b in pairs)
    return mcnemar(lost, gained), "exact McNemar test"


def mcnemar(lost: int, gained: int) -> float:
    """One-sided exact McNemar test: P(X ≥ lost) for X ~ Binomial(lost + gained, ½).

    Args:
        lost, gained: examples that only the champion, or only the candidate, had right.
    """
    from scipy.stats import binomtest  # slow

    return float(binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0


def sign_flip(losses: Sequence[float], seed: int = 0) -> float:
    """One-sided permutation test of paired losses: under the null hypothesis their signs are random.

    Compares their sum with those of 9,999 random choices of signs; the observed one counts as well. Not
    `scipy.stats.permutation_test`, which takes four times as long for 2,000 examples and draws other signs: a verdict
    that is asked for again must find the p-value that was recorded.
    """
    values = np.asarray(losses, dtype=np.float64)
    values = values[values != 0]
    observed = values.sum() - 1e-12 * np.abs(values).sum()  # sums in another order may differ in the last digit
    generator, extreme, left = np.random.default_rng(seed), 0, SIGN_CHOICES
    while left:
        rows = min(left, max(1, SIGNS_PER_BATCH // max(1, len(values))))
        signs = generator.integers(0, 2, size=(rows, len(values)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((signs @ values >= observed).sum())
        left -= rows
    return (1 + extreme) / (1 + SIGN_CHOICES)


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
    """Mean over tasks of weighted means over examples, and its 95 % percentile interval; None without a task.

    Examples are resampled within each task. What scipy resamples are their indices: a value stays with its weight.

    Args:
        parts: (values, weights) of each task, both (examples,).
    """
    from scipy.stats import bootstrap as resample  # slow

    if not parts:
        return None

    def statistic(*chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        means = [
            (values * weights)[index].sum(axis) / weights[index].sum(axis)
            for (values, weights), index in zip(parts, chosen, strict=True)
        ]
        return np.mean(means, axis=0)

    indices = [np.arange(len(values)) for values, _ in parts]
    samples = [np.repeat(index, 2) if len(index) == 1 else index for index in indices]  # scipy asks for two
    interval = resample(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_PER_BATCH,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"mean": float(statistic(*indices)), "low": float(interval.low), "high": float(interval.high)}
