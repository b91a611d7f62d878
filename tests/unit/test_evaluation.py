"""Scores do not depend on padding, batch size or the number of workers."""

import numpy as np
import pytest
import torch

from pipelines.data.encoding import Encoded, windows
from pipelines.data.kinds.base import EvaluationSet
from pipelines.distributed.world import World
from pipelines.evaluation.batching import make_batches
from pipelines.evaluation.evaluate import evaluate
from pipelines.models import heads
from pipelines.models.padding import last_token_features, pad

ALONE = World(0, 1, torch.device("cpu"))


def sequences(count: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, size=rng.integers(2, 20)) for _ in range(count)]


def text_set(stream: np.ndarray, window: int = 16, stride: int = 8) -> EvaluationSet:
    items = tuple(windows([stream], window, stride))
    return EvaluationSet("t", "retention", "nll", items, (), tuple(range(len(items))), (), "digest")


def classifier_set(ids: list[np.ndarray], labels: list[int]) -> EvaluationSet:
    items = tuple(Encoded(i, tokens) for i, tokens in enumerate(ids))
    rows = tuple(range(len(ids)))
    return EvaluationSet("reviews", "classifier", "accuracy", items, tuple(labels), rows, ("a", "b"), "digest")


def plain_nll(model, stream: np.ndarray, window: int, stride: int) -> float:
    """The definition, one window at a time, without any batching."""
    total = count = 0
    for item in windows([stream], window, stride):
        ids = torch.as_tensor(item.input_ids)[None]
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses = -log_probabilities[torch.arange(len(ids[0]) - 1), ids[0, 1:]]
        total += losses[item.start - 1 :].double().sum().item()
        count += len(losses) - (item.start - 1)
    assert count == len(stream) - 1
    return total / count


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_nll_is_that_of_the_plain_computation_for_any_batch_size(model, tokenizer, batch_tokens):
    stream = np.random.default_rng(0).integers(3, len(tokenizer), size=150)
    cell, outcomes = evaluate(model, text_set(stream), ALONE, batch_tokens, "retention", "key")
    assert cell.value == pytest.approx(plain_nll(model, stream, 16, 8), abs=1e-5)
    assert cell.tokens == 149 == sum(o["tokens"] for o in outcomes)
    assert cell.perplexity == pytest.approx(np.exp(cell.value))


def test_progress_reaches_all_examples_and_all_tokens(model, tokenizer):
    heads.attach_heads(model, {"reviews": 2}, seed=0)
    seen = []
    rows = classifier_set(sequences(30, len(tokenizer)), [i % 2 for i in range(30)])
    evaluate(model, rows, ALONE, 40, "task", "k", progress=lambda *numbers: seen.append(numbers))
    assert len(seen) > 5
    assert [done for done, *_ in seen] == sorted({done for done, *_ in seen})
    assert {count for _, count, _ in seen} == {30}
    assert seen[-1] == (30, 30, 1.0)
    assert 0 < seen[0][2] < 1


def test_padding_never_changes_a_score(model, tokenizer):
    heads.attach_heads(model, {"reviews": 2}, seed=0)
    ids = sequences(30, len(tokenizer))
    labels = [i % 2 for i in range(30)]
    together, _ = evaluate(model, classifier_set(ids, labels), ALONE, 10_000, "task", "k")
    _, outcomes = evaluate(model, classifier_set(ids, labels), ALONE, 10_000, "task", "k")
    _, alone = evaluate(model, classifier_set(ids, labels), ALONE, 1, "task", "k")
    assert outcomes == alone
    assert together.value == pytest.approx(np.mean([o["correct"] for o in alone]))
    losses = []
    for row, label in zip(ids, labels, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.as_tensor(row)[None], output_hidden_states=True).hidden_states[-1]
            scores = heads.get_head(model, "reviews")(hidden[0, -1])
        losses.append(-scores.log_softmax(-1)[label].item())
    assert together.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_each_example_counts_once_whatever_the_number_of_workers(tokenizer):
    stream = np.random.default_rng(1).integers(3, len(tokenizer), size=333)
    batches = make_batches(text_set(stream).items, 64)
    for size in (1, 2, 3):
        dealt = [item.example for rank in range(size) for batch in batches[rank::size] for item in batch]
        assert sorted(dealt) == list(range(len(text_set(stream).items)))
    assert all(len(b) * max(len(i.input_ids) for i in b) <= 64 for b in batches)


def test_verbalizer_picks_the_likeliest_label(model, tokenizer):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, len(tokenizer), size=5) for _ in range(8)]
    answers = [np.array([7]), np.array([9, 11])]
    items = tuple(
        Encoded(i, np.concatenate([p, a]), start=5, choice=c)
        for i, p in enumerate(prompts)
        for c, a in enumerate(answers)
    )
    evaluation = EvaluationSet("v", "verbalizer", "accuracy", items, (0,) * 8, tuple(range(8)), ("x", "y"), "d")
    cell, outcomes = evaluate(model, evaluation, ALONE, 100, "task", "k")
    losses = []
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        likelihoods = []
        for answer in answers:
            ids = torch.as_tensor(np.concatenate([prompt, answer]))[None]
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].log_softmax(-1)
            likelihoods.append(sum(scores[4 + k, token].item() for k, token in enumerate(answer)))
        assert outcome["prediction"] == int(np.argmax(likelihoods))
        losses.append(-torch.tensor(likelihoods).log_softmax(-1)[0].item())
    assert cell.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_last_token_is_the_last_real_one():
    ids, mask, _ = pad([[5, 6, 7], [8]], torch.device("cpu"))
    hidden = torch.arange(6.0).reshape(2, 3, 1)
    assert last_token_features(hidden, mask).flatten().tolist() == [2.0, 3.0]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids[1, 1:].tolist() == [0, 0]


def test_heads_are_the_same_on_every_rank_and_differ_by_task(model):
    first = heads.attach_heads(model, {"a": 2, "b": 2}, seed=0)
    weights = [head.weight.clone() for head in first.values()]
    again = heads.attach_heads(model, {"b": 2, "a": 2}, seed=0)
    assert torch.equal(weights[0], heads.get_head(model, "a").weight)
    assert not torch.equal(weights[0], weights[1])
    assert not any(p.requires_grad for p in again.parameters())
    heads.train_heads(model, ("a",))
    assert list(heads.trainable_heads(model)) == ["a"]
    assert {heads.task_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"a", None}
    heads.detach_heads(model)
    assert heads.get_heads(model) is None


def test_a_task_may_be_called_like_a_method_of_a_module(model):
    heads.attach_heads(model, {"keys": 2, "train": 3}, seed=0)
    assert heads.get_head(model, "train").out_features == 3
