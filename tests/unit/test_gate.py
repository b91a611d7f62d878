"""The gate against a champion: a loss counts if it is over its limit and no accident."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pipelines.config.sections import GateConfig
from pipelines.metrics.paired import mcnemar, paired_p_value, sign_flip
from pipelines.promotion.gate import Side, judge, judge_against
from pipelines.runs.results import BenchmarkScores
from tests.unit import sample_records

NOTHING = sample_records.results()


def cell(name: str, value: float, role: str = "task", metric: str = "accuracy", key: str = "same", count: int = 200):
    perplexity = math.exp(value) if metric == "nll" else None
    return sample_records.cell(name, metric, value, role=role, key=key, count=count, perplexity=perplexity)


def side(outcomes: dict[str, list[dict]] | None = None, tasks=(), **cells) -> Side:
    return Side({name: cell(name, **given) for name, given in cells.items()}, (outcomes or {}).__getitem__, tasks)


def answers(right: int, count: int = 200) -> list[dict]:
    return [{"id": i, "correct": i < right} for i in range(count)]


def losses(values) -> list[dict]:
    return [{"id": i, "nll": float(value), "tokens": 10} for i, value in enumerate(values)]


def test_a_task_that_was_forgotten_is_refused_with_its_reason():
    champion = side({"mrpc": answers(160)}, mrpc={"value": 0.8})
    candidate = side({"mrpc": answers(120)}, mrpc={"value": 0.6})
    verdict = judge_against(champion, candidate, NOTHING, GateConfig())
    assert not verdict["passed"]
    (reason,) = verdict["reasons"]
    assert "mrpc: accuracy 0.8000 → 0.6000" in reason and "exact McNemar test" in reason
    assert verdict["comparisons"][0]["p"] == pytest.approx(0.5**40)


def test_a_large_loss_that_may_be_an_accident_is_let_pass_and_named():
    champion = side({"mrpc": answers(6, 10)}, mrpc={"value": 0.6, "count": 10})
    candidate = side({"mrpc": answers(4, 10)}, mrpc={"value": 0.4, "count": 10})
    verdict = judge_against(champion, candidate, NOTHING, GateConfig())
    assert verdict["passed"] and "not significant (p = 0.25)" in verdict["notes"][0]


def test_a_certain_loss_within_its_limit_is_let_pass_without_a_test():
    champion, candidate = side(mrpc={"value": 0.80}), side(mrpc={"value": 0.79})  # no outcomes: they must not be read
    verdict = judge_against(champion, candidate, NOTHING, GateConfig(max_forgetting=0.02))
    assert verdict["passed"] and verdict["comparisons"][0]["p"] is None


@pytest.mark.parametrize(("role", "limit"), [("task", "max_nll_increase"), ("retention", "max_perplexity_ratio")])
def test_text_and_retained_text_are_compared_by_their_losses(role, limit):
    noise = np.random.default_rng(0).normal(size=60)
    before, after = losses(40 + noise), losses(42 + noise)
    champion = side({"text": before}, text={"value": 4.0, "metric": "nll", "role": role})
    candidate = side({"text": after}, text={"value": 4.2, "metric": "nll", "role": role})
    verdict = judge_against(champion, candidate, NOTHING, GateConfig())
    assert not verdict["passed"] and "sign-flip test" in verdict["reasons"][0]
    assert ("a rise by 22.1% over the limit 5.0%" in verdict["reasons"][0]) == (role == "retention")
    assert judge_against(champion, candidate, NOTHING, GateConfig(**{limit: None}))["passed"]
    assert judge_against(candidate, champion, NOTHING, GateConfig())["passed"]  # an improvement


@pytest.mark.parametrize(("after", "p", "passes"), [(0.30, 0.001, False), (0.30, 0.2, True), (0.395, 0.001, True)])
def test_a_benchmark_may_not_lose_more_than_the_limit_significantly(after, p, passes):
    scores = BenchmarkScores("acc", 100, [0.4, after], [None, None], p)
    verdict = judge(sample_records.results(benchmarks={"quiz": scores}), GateConfig(max_forgetting=0.02))
    assert verdict["passed"] == passes
    texts = verdict["reasons"] + verdict.get("notes", [])
    assert ["quiz: acc 0.4000 → 0.3000, a loss of 0.1000 over the limit 0.02" in text for text in texts] == (
        [True] if after == 0.30 else []
    )
    assert judge(sample_records.results(benchmarks={"quiz": scores}), GateConfig(max_forgetting=None))["passed"]


def test_a_benchmark_is_compared_with_the_champion_by_its_score():
    champion = side({"quiz": answers(80, 100)}, quiz={"value": 0.8, "metric": "acc", "role": "benchmark"})
    candidate = side({"quiz": answers(60, 100)}, quiz={"value": 0.6, "metric": "acc", "role": "benchmark"})
    verdict = judge_against(champion, candidate, NOTHING, GateConfig())
    assert "quiz: acc 0.8000 → 0.6000, a loss of 0.2000 over the limit 0.02 (exact McNemar" in verdict["reasons"][0]


def test_what_the_champion_has_learned_must_be_measured():
    champion = side(tasks=("mrpc",), mrpc={"value": 0.8}, later={"value": 0.5})
    verdict = judge_against(champion, side(), NOTHING, GateConfig())
    assert verdict["reasons"] == ["mrpc: the champion has learned it, the candidate was not scored on it"]


def test_scores_on_other_test_data_are_not_compared():
    champion, candidate = side(mrpc={"value": 0.8}), side(mrpc={"value": 0.1, "key": "changed"})
    verdict = judge_against(champion, candidate, NOTHING, GateConfig())
    assert verdict["passed"] and verdict["comparisons"] == []
    assert "mrpc is not compared" in verdict["notes"][0]


def test_a_floor_of_learning_holds_beside_the_champion():
    verdict = judge_against(
        side(), side(), sample_records.results(learning_accuracy=0.5), GateConfig(min_learning_accuracy=0.7)
    )
    assert verdict["reasons"] == ["learning accuracy 0.5000 is below the limit 0.7"]


def test_outcomes_of_other_examples_cannot_be_paired():
    with pytest.raises(ValueError, match="different examples"):
        paired_p_value(answers(1, 3), answers(1, 4))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (0, 5), (9, 3), (30, 31)])
def test_mcnemar_is_the_tail_of_a_fair_coin(lost, gained):
    flips = [math.comb(lost + gained, k) for k in range(lost + gained + 1)]
    assert mcnemar(lost, gained) == pytest.approx(sum(flips[lost:]) / sum(flips))


def test_mcnemar_ignores_examples_that_both_had_right_or_wrong():
    # 30 of 88 lost, 8 gained, 50 alike: the upper tail of Binomial(38, 1/2) from 30
    first = [{"id": i, "correct": i < 30 or i >= 38} for i in range(88)]
    second = [{"id": i, "correct": i >= 30} for i in range(88)]
    tail = sum(math.comb(38, k) for k in range(30, 39)) / 2**38
    assert paired_p_value(first, second) == (pytest.approx(tail), "exact McNemar test")
    assert paired_p_value(first, first) == (1.0, "exact McNemar test")


def test_sign_flip_agrees_with_all_sign_choices():
    values = np.random.default_rng(3).normal(0.4, 1, size=10)
    sums = [np.dot(signs, values) for signs in itertools.product((-1, 1), repeat=10)]
    exact = np.mean(np.array(sums) >= values.sum() - 1e-12)
    assert sign_flip(values) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip(-values) > 1 - exact - 0.03
