"""Batches are global and the loss is the mean over the global batch, whatever the number of workers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from curlora.continual import STRATEGIES, Example, Sequential, make_strategy
from pipelines.config.names import STRATEGIES as NAMES
from pipelines.config.sections import TrainingConfig, micro_batch
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.models import heads
from pipelines.training.arguments import optimizer_steps
from pipelines.training.batches import GlobalBatches, collate
from pipelines.training.example_losses import example_losses

CPU = torch.device("cpu")


def examples(count: int) -> list[Example]:
    return [Example("reviews", tuple(range(3, 5 + i % 7)), target=i % 2) for i in range(count)]


def stream(data, batch_size, seed, world, position=0, count=None) -> list[dict]:
    """One epoch of micro-batches, or `count` of them."""
    batches = GlobalBatches(data, batch_size, seed, world, Sequential().batch, position)
    return list(itertools.islice(batches, count or batches.per_epoch))


def ids_of(batches: list[dict]) -> list[list[int]]:
    return [[id(example) for example in batch.examples] for batch in batches]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_the_same_global_batches(count, batch_size, size, seed):
    data = examples(count)
    per_rank = [stream(data, batch_size, seed, World(rank, size, CPU)) for rank in range(size)]
    alone = stream(data, batch_size, seed, World(0, 1, CPU))
    for number, whole in enumerate(alone):
        parts = [e for b in per_rank if b[number].scale for e in b[number].examples]
        assert sorted(map(id, parts)) == sorted(map(id, whole.examples))
    seen = [e for batch in alone for e in batch.examples]
    assert sorted(map(id, seen)) == sorted(map(id, data))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 60))
def test_a_resumed_stream_goes_on_with_the_next_unseen_batch(count, batch_size, position):
    data, world = examples(count), World(0, 1, CPU)
    whole = stream(data, batch_size, 0, world, count=position + 5)
    assert ids_of(stream(data, batch_size, 0, world, position, count=5)) == ids_of(whole[position:])


def test_epochs_differ_and_seeds_repeat():
    data, world = examples(20), World(0, 1, CPU)
    first, second = ids_of(stream(data, 20, 0, world, count=2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert ids_of(stream(data, 20, 0, world, count=2)) == [first, second]


def global_loss(model, batch: list[Example], size: int) -> float:
    parts = [collate(batch, World(rank, size, CPU)) for rank in range(size)]
    return sum(float(example_losses(model, part)[0].sum() * part.scale) for part in parts)


def test_loss_is_the_mean_over_the_global_batch_for_any_number_of_workers(model):
    heads.attach_heads(model, {"reviews": 2}, seed=0)
    heads.train_heads(model, ("reviews",))
    batch = [
        *examples(5),
        Example("text", (3, 4, 5, 6), labels=(3, 4, 5, 6)),
        Example("v", (3, 4, 9), (IGNORE, IGNORE, 9)),
    ]
    with torch.no_grad():
        losses = [global_loss(model, batch, size) for size in (1, 2, 3, 9)]
        singles = [global_loss(model, [example], 1) for example in batch]
    assert losses == pytest.approx([sum(singles) / len(singles)] * 4, rel=1e-5)


def test_example_losses_against_the_definition(model):
    heads.attach_heads(model, {"reviews": 2}, seed=0)
    heads.train_heads(model, ("reviews",))
    batch = [
        Example("reviews", (3, 4, 5), target=1),
        Example("text", (3, 4, 5, 6, 7), labels=(IGNORE, IGNORE, 5, 6, 7)),
    ]
    with torch.no_grad():
        losses, output = example_losses(model, collate(batch, World(0, 1, CPU)))
        plain = model(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0]
        hidden = model(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states[-1][0, -1]
        class_loss = cross_entropy(heads.get_head(model, "reviews")(hidden)[None], torch.tensor([1]))
    assert losses[1].item() == pytest.approx(cross_entropy(plain[1:4], torch.tensor([5, 6, 7])).item(), rel=1e-5)
    assert losses[0].item() == pytest.approx(class_loss.item(), rel=1e-5)
    assert output.hidden_states.shape[:2] == output.attention_mask.shape


def test_every_trainable_head_gets_a_gradient_even_without_examples(model):
    heads.attach_heads(model, {"reviews": 2, "other": 3}, seed=0)
    heads.train_heads(model, ("reviews", "other"))
    losses, _ = example_losses(model, collate(examples(3), World(0, 1, CPU)))
    losses.sum().backward()
    assert heads.get_head(model, "other").weight.grad.abs().sum() == 0
    assert heads.get_head(model, "reviews").weight.grad.abs().sum() > 0


def test_a_replayed_example_goes_through_the_head_of_its_own_task_and_leaves_it_as_it_is(model):
    heads.attach_heads(model, {"reviews": 2, "old": 3}, seed=0)
    replay = make_strategy("replay", size=2)
    replay.reservoir.add_task("old", [Example("old", (3, 4, 5), target=2), Example("old", (6, 7), target=0)], 0)
    heads.train_heads(model, ("reviews",))
    batch, held = replay.batch(examples(2)), replay.held_heads()
    losses, _ = example_losses(model, collate(batch, World(0, 1, CPU)), held)
    for row, example in enumerate(batch):
        alone, _ = example_losses(model, collate([example], World(0, 1, CPU)), held)
        hidden = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        wanted = cross_entropy(heads.get_head(model, example.task)(hidden)[None], torch.tensor([example.target]))
        assert losses[row].item() == pytest.approx(wanted.item(), rel=1e-5)
        assert alone.item() == pytest.approx(wanted.item(), rel=1e-5)
    losses[[example.replayed for example in batch]].sum().backward()
    assert heads.get_head(model, "old").weight.grad is None
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0, "what lies below the head learns from it"


def test_held_heads_can_be_asked_what_they_say_and_trained_ones_are_not_among_them(model):
    heads.attach_heads(model, {"reviews": 2, "old": 3}, seed=0)
    heads.train_heads(model, ("reviews",))
    batch = [Example("reviews", (3, 4, 5), target=1), Example("reviews", (6, 7), target=0)]
    _, output = example_losses(model, collate(batch, World(0, 1, CPU)), held=("old", "text"))
    said = output.held_scores(output.hidden_states, output.attention_mask)
    assert said.keys() == {"old"}
    for row, example in enumerate(batch):
        hidden = model(input_ids=torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        assert torch.allclose(said["old"][row], heads.get_head(model, "old")(hidden), atol=1e-5)


def test_an_example_whose_head_is_not_used_is_an_error(model):
    heads.attach_heads(model, {"reviews": 2, "old": 3}, seed=0)
    heads.train_heads(model, ("reviews",))
    with pytest.raises(ValueError, match="old have neither labels nor a head"):
        example_losses(model, collate([Example("old", (3, 4), target=1)], World(0, 1, CPU)))


def test_step_arithmetic():
    training = TrainingConfig(batch_size=16, gradient_accumulation=2, epochs=3)
    assert optimizer_steps(training, 100) == 20  # 3 × 13 micro-batches of 8, two a step
    assert optimizer_steps(TrainingConfig(max_steps=5), 100) == 5
    assert optimizer_steps(TrainingConfig(max_steps=5), 100, tasks=3) == 15
    assert optimizer_steps(training, 100, tasks=3) == 20  # the epochs are over the examples of all of them
    assert micro_batch(training, 3) == 3


def test_unknown_strategy_or_option_is_named():
    assert sorted(STRATEGIES) == sorted(NAMES)  # the configuration knows them without importing torch
    with pytest.raises(ValueError, match="expected one of"):
        make_strategy("replya")
    with pytest.raises(ValueError, match="does not take"):
        make_strategy("sequential", strength=1.0)
