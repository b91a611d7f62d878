"""Scores of answers: accuracy, F1, ROUGE-L, exact match."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache


def majority_rate(labels: Sequence[int]) -> float | None:
    """Accuracy of always answering the most frequent class of these labels."""
    if not labels:
        return None
    return max(Counter(labels).values()) / len(labels)


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Unweighted mean of the F1 of every class that occurs among labels or predictions."""
    scores = []
    for c in set(labels) | set(predictions):
        hits = sum(p == y == c for p, y in zip(predictions, labels, strict=True))
        total = sum(p == c for p in predictions) + sum(y == c for y in labels)
        scores.append(2 * hits / total)
    return math.fsum(scores) / len(scores)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and superfluous spaces (SQuAD, Rajpurkar et al. 2016)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same after `normalise_answer`, else 0."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of normalised words, as in SQuAD; two empty answers agree."""
    found, wanted = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the package `rouge-score`."""
    return _rouge().score(reference, prediction)["rougeL"].fmeasure


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: a second, for generation tasks only

    return RougeScorer(["rougeL"])


GENERATION_METRICS = {"rouge_l": rouge_l, "token_f1": token_f1, "exact_match": exact_match}
