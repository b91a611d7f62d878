"""The router that tells tasks apart by the base's own activations, and the bank of adapters that it chooses from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from strategy_cases import adapted, context, forward, train

from curlora.continual import Example, make_strategy
from curlora.continual.parameters import adapter_parameters, read, write
from curlora.continual.routing import Moments, Router
from pipelines.data.encoding import Encoded
from pipelines.data.kinds.base import EvaluationSet
from pipelines.distributed.world import World
from pipelines.evaluation.evaluate import evaluate, routes_of, score
from pipelines.models.bank import Bank, bank_of, prompt

ALONE = World(0, 1, torch.device("cpu"))
WORDS = {"base": (3, 40), "low": (3, 12), "high": (28, 40)}  # the tokens that a task's texts are made of


def texts(task: str, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng([seed, *task.encode()])
    return [tuple(generator.integers(*WORDS[task], size=24).tolist()) for _ in range(count)]


def examples(task: str, count: int) -> list[Example]:
    return [Example(task, text, text) for text in texts(task, count)]


def moments(covariance: torch.Tensor, rows: int, seed: int, last: torch.Tensor | None = None) -> Moments:
    """Moments of rows of 50 tokens with a covariance (k, k), of one layer; the last four have another one."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 50, len(covariance), generator=generator) @ torch.linalg.cholesky(covariance).t()
    if last is not None:
        z[:, -4:] = torch.randn(rows, 4, len(last), generator=generator) @ torch.linalg.cholesky(last).t()
    whole, ends = (torch.einsum("bti,btj->bij", part, part) / part.shape[1] for part in (z, z[:, -4:]))
    return Moments({"layer": whole}, {"layer": ends}, torch.full((rows,), 50))


@pytest.fixture
def filled(model):
    """A model with a bank of two tasks, trained one after the other from the same start."""
    wrapped, bank = adapted(model, "curlora"), Bank()
    for parameter in adapter_parameters(wrapped).values():
        parameter.data.zero_()
    bank.begin(wrapped, texts("base", 32))
    for position, task in enumerate(("low", "high"), 1):
        write(adapter_parameters(wrapped), bank.weights[0])
        train(wrapped, make_strategy("sequential"), context(task, position, examples(task, 24)))
        bank.add(wrapped, task, examples(task, 64), read(adapter_parameters(wrapped)))
    bank.attach(wrapped)
    return wrapped


def evaluation(task: str, count: int = 20, start: int = 1) -> EvaluationSet:
    items = tuple(Encoded(i, np.array(text), start) for i, text in enumerate(texts(task, count, seed=1)))
    return EvaluationSet(task, "retention", "nll", items, (), tuple(range(count)), (), "digest")


def test_a_text_goes_to_the_task_whose_moments_it_has():
    base, first = torch.eye(6), torch.diag(torch.tensor([4.0, 4, 1, 1, 1, 1]))
    second = torch.diag(torch.tensor([1.0, 1, 4, 4, 1, 1]))
    router = Router()
    for seed, covariance in enumerate((base, first, second)):
        router.fit(moments(covariance, 100, seed))
    for place, covariance in enumerate((base, first, second)):
        found = router.route(moments(covariance, 100, 10 + place))
        assert (found == place).float().mean() >= 0.9


def test_a_text_nearer_to_the_base_than_any_of_the_tasks_own_goes_to_the_base():
    router = Router()
    router.fit(moments(torch.eye(6), 100, 0))
    router.fit(moments(torch.diag(torch.tensor([4.0, 4, 1, 1, 1, 1])), 100, 1))
    between = moments(torch.diag(torch.tensor([2.3, 2.3, 1, 1, 1, 1])), 100, 2)
    likelihoods = router.likelihoods(between)
    assert (likelihoods[:, 1] > likelihoods[:, 0]).float().mean() > 0.7
    assert (router.route(between) == 0).float().mean() > 0.7


def test_the_end_of_a_template_tells_tasks_with_the_same_words_apart():
    base, end = torch.eye(6), torch.diag(torch.tensor([9.0, 0.1, 0.1, 0.1, 0.1, 9.0]))
    router = Router()
    for seed, last in enumerate((None, end, end.flip(0, 1) @ torch.diag(torch.tensor([1.0, 1, 90, 1, 1, 1])))):
        router.fit(moments(base, 100, seed, last))
    assert (router.route(moments(base, 100, 10)) == 0).float().mean() >= 0.95
    assert (router.route(moments(base, 100, 11, end)) == 1).float().mean() >= 0.95


def test_a_new_task_changes_nothing_of_what_the_others_find_likely():
    router, seen = Router(), moments(2 * torch.eye(4), 10, 9)
    for place in range(3):
        router.fit(moments((1 + place) * torch.eye(4), 50, place))
    before = router.likelihoods(seen)
    router.fit(moments(5 * torch.eye(4), 50, 4))
    assert torch.equal(router.likelihoods(seen)[:, :3], before)


def test_units_of_a_coordinate_and_order_of_texts_do_not_matter():
    scale = torch.tensor([1.0, 100.0, 0.01])

    def scaled(seen: Moments) -> Moments:
        parts = ({"layer": part["layer"] * scale[:, None] * scale} for part in (seen.whole, seen.last))
        return Moments(*parts, seen.tokens)

    plain, other = Router(), Router()
    for place in range(3):
        seen = moments((1.0 + place) * torch.eye(3), 60, place)
        plain.fit(seen)
        other.fit(scaled(seen))
    seen, order = moments(2 * torch.eye(3), 60, 7), torch.randperm(60)
    assert torch.equal(plain.route(seen), other.route(scaled(seen)))
    assert torch.equal(plain.route(seen[order]), plain.route(seen)[order])


def test_one_text_is_too_little_to_know_a_task_by():
    with pytest.raises(ValueError, match="1 text is too little"):
        Router().fit(moments(torch.eye(3), 1, 0))


def test_each_task_is_answered_by_its_own_adapter_and_other_text_by_the_base(filled):
    bank = bank_of(filled)
    for place, task in enumerate(bank.tasks):
        routes = routes_of(filled, evaluation(task), ALONE)
        assert np.mean([chosen == place for chosen in routes.values()]) >= 0.9
        with bank.active(filled, place):
            expected = [float(forward(filled, [Example(task, t, t)])[0]) for t in texts(task, 20, seed=1)]
        cell, outcomes = evaluate(filled, evaluation(task), ALONE, 100, "task", "key")
        for outcome, value in zip(outcomes, expected, strict=True):
            if outcome["route"] == task:
                assert outcome["nll"] / outcome["tokens"] == pytest.approx(value, rel=1e-5)
        assert cell.extras["routed_home"] == np.mean([o["route"] == task for o in outcomes])


def test_batches_and_padding_never_change_a_route(filled):
    mixed = evaluation("low")
    longer = [replace(item, input_ids=item.input_ids[: 3 + number]) for number, item in enumerate(mixed.items)]
    together = bank_of(filled).routes(filled, [item.input_ids for item in longer], ALONE)
    alone = [bank_of(filled).routes(filled, [item.input_ids], ALONE)[0] for item in longer]
    assert together == alone


def test_a_bank_read_from_its_folder_scores_with_the_same_bits(filled, tmp_path):
    expected = evaluate(filled, evaluation("high"), ALONE, 100, "task", "key")[1]
    bank_of(filled).save(tmp_path)
    loaded = Bank.load(tmp_path)
    loaded.attach(filled)
    assert evaluate(filled, evaluation("high"), ALONE, 100, "task", "key")[1] == expected
    assert loaded.tasks == ["base", "low", "high"]
    assert Bank.load(tmp_path / "nowhere") is None


def test_a_named_route_goes_before_the_router(filled):
    asked = evaluation("low")
    named = dict.fromkeys(range(20), bank_of(filled).tasks.index("high"))
    with bank_of(filled).active(filled, named[0]):
        expected = [float(forward(filled, [Example("low", t, t)])[0]) for t in texts("low", 20, seed=1)]
    scored = sorted(score(filled, asked, ALONE, 100, routes=named), key=lambda scored: scored.example)
    assert [s.nll / s.tokens for s in scored] == pytest.approx(expected, rel=1e-5)


def test_a_task_trained_again_replaces_itself(filled):
    bank = bank_of(filled)
    before = bank.weights[2]
    bank.add(filled, "low", examples("high", 64), {name: value + 1 for name, value in bank.weights[1].items()})
    assert bank.tasks == ["base", "high", "low"] and len(bank.router) == 3
    assert bank.weights[1] is before


def test_a_prompt_is_what_comes_before_the_first_target_unless_that_is_too_short():
    ids = tuple(range(10))
    assert prompt(Example("t", ids, (-100,) * 6 + ids[6:])) == ids[:6]
    assert prompt(Example("t", ids, (-100,) * 2 + ids[2:])) == ids
    assert prompt(Example("t", ids, ids)) == ids
    assert prompt(Example("t", ids, None, target=1)) == ids
