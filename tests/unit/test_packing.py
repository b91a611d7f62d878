"""Packed examples do not see each other: every loss, gradient and strategy is as with one example per row."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from curlora.continual import STRATEGIES, Example, Sequential, TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters
from pipelines.config.loading import parse_config
from pipelines.data.encoding import IGNORE
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.models import heads
from pipelines.models.packing import separates_documents
from pipelines.preflight.model import check_model, with_packing
from pipelines.runs.step_record import Setting
from pipelines.training.batches import GlobalBatches, collate, rows_of
from pipelines.training.example_losses import drawn_targets, example_losses, losses_alone
from tests.conftest import minimal
from tests.families import GATED, SEPARATING, tiny, write
from tests.unit.strategy_cases import adapted, write_

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
ROW = 24  # tokens per packed row
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def examples(lengths, task: str = "text", vocabulary: int = 290, seed: int = 0) -> list[Example]:
    """Answers of different lengths after prompts of different lengths; every third one has two documents."""
    rng, found = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        ids = tuple(rng.integers(3, vocabulary, size=length).tolist())
        start = int(rng.integers(0, length))
        labels = [*[IGNORE] * start, *ids[start:]]
        breaks = (length // 2,) if number % 3 == 2 and length > 3 else ()
        for position in breaks:
            labels[position] = IGNORE
        found.append(Example(task, ids, tuple(labels), breaks=breaks))
    return found


# -- the layout


@settings(deadline=None)
@given(LENGTHS)
def test_every_token_has_one_place_and_no_row_is_too_long(lengths):
    part = examples(lengths)
    rows = rows_of(lengths, ROW)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= max(ROW, *lengths) for row in rows)
    batch, padded = collate(part, ALONE, packing=ROW), collate(part, ALONE)
    assert int(batch.attention_mask.sum()) == sum(lengths)
    assert len(batch.input_ids) == len(rows)
    assert batch.input_ids.numel() <= padded.input_ids.numel()
    if batch.places is None:
        assert len(rows) == len(part)  # there is nothing to gain
        return
    for number, example in enumerate(part):
        places = batch.places[number][: len(example.input_ids)]
        assert (batch.places[number][len(example.input_ids) :] == -1).all()
        assert tuple(batch.input_ids.flatten()[places].tolist()) == example.input_ids
        starts = (0, *example.breaks, len(example.input_ids))
        positions = [position for a, b in itertools.pairwise(starts) for position in range(b - a)]
        assert batch.position_ids.flatten()[places].tolist() == positions
        assert batch.labels.flatten()[places].tolist() == [IGNORE, *example.labels[1:]]
    assert len(set(batch.places[batch.places >= 0].tolist())) == sum(lengths)


def test_packed_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(10, 120, size=32).tolist()
    packed, padded = collate(examples(lengths), ALONE, packing=256), collate(examples(lengths), ALONE)
    assert packed.input_ids.numel() < 1.05 * sum(lengths) < 1.5 * sum(lengths) < padded.input_ids.numel()


def test_examples_that_fill_their_rows_are_laid_out_as_without_packing():
    part = examples([8, 8, 8])
    packed, padded = collate(part, ALONE, packing=8), collate(part, ALONE)
    assert packed.places is None
    assert torch.equal(packed.input_ids, padded.input_ids) and torch.equal(packed.labels, padded.labels)


# -- losses


@pytest.fixture(params=SEPARATING)
def model(request, tokenizer):
    return tiny(request.param, tokenizer, scale=4)


MIXED = [11, 3, 8, 5, 2, 16, 4, 6]


def both(model, part, held=()):
    return [example_losses(model, collate(part, ALONE, packing), held) for packing in (ROW, 0)]


def test_losses_gradients_states_and_predictions_are_those_of_padded_examples(model):
    part = examples(MIXED)
    assert collate(part, ALONE, packing=ROW).places is not None
    (packed, ours), (padded, theirs) = both(model, part)
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=1e-4)
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(losses.sum(), weight)[0] for losses in (packed, padded)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)
    mask = ours.attention_mask.bool()
    assert torch.allclose(ours.hidden_states[mask], theirs.hidden_states[mask], rtol=1e-3, atol=1e-4)
    whole = [Example("text", example.input_ids, example.input_ids) for example in part if len(example.input_ids) > 4]
    (_, ours), (_, theirs) = both(model, whole)
    assert torch.allclose(ours.logits([2, 0], 4), theirs.logits([2, 0], 4), rtol=1e-3, atol=1e-4)


def test_another_example_of_the_row_changes_nothing(model):
    part = examples(MIXED)
    changed = [part[0], *examples(MIXED, seed=1)[1:]]
    (packed, _), (again, _) = (example_losses(model, collate(p, ALONE, packing=ROW)) for p in (part, changed))
    assert packed[0].item() == pytest.approx(again[0].item(), rel=1e-4)
    assert packed[1].item() != pytest.approx(again[1].item(), rel=1e-4)


def test_classifier_heads_read_the_last_token_of_each_packed_example(tokenizer):
    model = tiny("qwen3", tokenizer, scale=4)
    heads.attach_heads(model, {"new": 3, "old": 2}, seed=0)
    heads.train_heads(model, ("new",))
    rng = np.random.default_rng(0)
    part = [
        Example(("new", "old")[i % 2], tuple(rng.integers(3, 290, size=n).tolist()), target=i % 2)
        for i, n in enumerate(MIXED)
    ]
    (packed, ours), (padded, theirs) = both(model, [*part, *examples([4, 3])], held=("old",))
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=1e-4)
    said = [o.held_scores(o.hidden_states, o.attention_mask)["old"] for o in (ours, theirs)]
    assert torch.allclose(*said, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["tied and scaled", "trained output layer"])
def test_models_whose_logits_are_not_one_linear_layer(tokenizer, how):
    model = tiny("gemma3", tokenizer, scale=2)
    if how == "tied and scaled":
        model.config.final_logit_softcapping = 2.0
        model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    part = [Example("text", example.input_ids, example.input_ids) for example in examples([9, 3, 4, 6, 2])]
    (packed, ours), (padded, theirs) = both(model, part)
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=1e-4)
    assert torch.allclose(ours.logits([3, 1], 2), theirs.logits([3, 1], 2), rtol=1e-3, atol=1e-4)


# -- strategies


def trained(model_of, strategy_name: str, packing: bool) -> dict[str, torch.Tensor]:
    """Adapter parameters after two tasks of three steps each, by plain gradient descent."""
    model = adapted(model_of(), KINDS.get(strategy_name, "curlora"))
    strategy = make_strategy(strategy_name, **OPTIONS.get(strategy_name, {}))
    for position, task in enumerate(("first", "second"), 1):
        rows = examples([7, 3, 12, 5, 4, 9, 2, 6], task, seed=position)
        context = TaskContext(
            task,
            position,
            0,
            rows,
            losses=lambda model, part: losses_alone(model, part, CPU),
            draw=lambda model, part, seed: drawn_targets(model, part, CPU, seed),
            write=write_,
        )
        strategy.before_task(model, context)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        stream = GlobalBatches(rows, 4, 0, ALONE, strategy.batch, packing=ROW if packing else 0)
        for step, batch in enumerate(itertools.islice(stream, 3), 1):
            assert (batch.places is not None) == packing
            losses, output = example_losses(model, batch, strategy.held_heads())
            output.loss, output.replayed = losses.sum() * batch.scale, batch.replayed
            strategy.loss(model, batch.examples, output).backward()
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step(model, step)
        strategy.after_task(model, context)
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


OPTIONS = {
    "replay": {"size": 4},
    "clora": {"k": 4},
    "rehearsal": {"base_rows": 8, "base_length": 10, "share": 0.25, "base_share": 0.25},
}
KINDS = {"clora": "lora"}  # adapter that a strategy needs


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"joint", "olora"}))  # these need other loops
def test_every_strategy_trains_the_same_on_packed_batches(name, tokenizer):
    def model_of():
        return tiny("qwen3", tokenizer, scale=2)

    packed, padded = (trained(model_of, name, packing) for packing in (True, False))
    start = adapter_parameters(adapted(model_of(), KINDS.get(name, "curlora")))
    moved = max(float((padded[key] - start[key].detach()).abs().max()) for key in padded)
    difference = max(float((packed[key] - padded[key]).abs().max()) for key in padded)
    assert moved > 1e-3
    assert difference < 1e-3 * moved


# -- which bases, and what it is not part of


@pytest.fixture
def config_of(tokenizer, tmp_path, reviews):
    def make(family: str, **training):
        base = {"path": str(write(family, tokenizer, tmp_path / family)), "dtype": "float32"}
        raw = minimal(tmp_path, reviews, base_model=base, adapter={"r": 4}, training=training)
        return parse_config(raw)

    return make


def test_auto_packs_where_examples_are_kept_apart(config_of):
    assert with_packing(config_of("gpt2")).training.packing is True
    assert with_packing(config_of("opt")).training.packing is False
    assert with_packing(config_of("gpt2", packing=False)).training.packing is False
    assert check_model(config_of("opt")) == []


def test_packing_is_refused_where_examples_would_see_each_other(config_of):
    assert check_model(config_of("gpt2", packing=True)) == []
    (problem,) = check_model(config_of("opt", packing=True))
    assert problem.field == "training.packing"
    assert "a base of type 'opt' lets every example of a row see those before it" in problem.message
    with pytest.raises(ConfigError, match="group_by_length: true"):
        with_packing(config_of("opt", packing=True))


@pytest.mark.parametrize(
    "config",
    [
        transformers.Lfm2Config(**GATED, layer_types=["conv", "full_attention"]),
        transformers.Qwen3NextConfig(**GATED, layer_types=["linear_attention", "full_attention"]),
        transformers.JambaConfig(**GATED, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    ],
    ids=["lfm2", "qwen3-next", "jamba"],
)
def test_bases_that_mix_attention_with_other_layers_keep_nothing_apart(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert separates_documents(model) is False


def test_neither_field_changes_the_identity_of_a_step_that_leaves_it_as_it_is(config_of):
    old, packed = (Setting.of(config_of("gpt2", **training)) for training in ({}, {"packing": True}))
    assert old == packed
    assert {"packing", "group_by_length"}.isdisjoint(old.training)
    assert Setting.of(config_of("gpt2", group_by_length=True)).training["group_by_length"] is True


# -- batches of similar length


def stream(data, batch_size, world=ALONE, position=0, count=None, grouped=True) -> list:
    batches = GlobalBatches(data, batch_size, 0, world, Sequential().batch, position, grouped=grouped)
    return list(itertools.islice(batches, count or batches.per_epoch))


def ids_of(batches) -> list[list[int]]:
    return [[id(example) for example in batch.examples] for batch in batches]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 60))
def test_grouped_batches_are_the_same_on_all_ranks_and_after_an_interruption(lengths, batch_size, size, position):
    data = examples(lengths)
    alone = stream(data, batch_size)
    per_rank = [stream(data, batch_size, World(rank, size, CPU)) for rank in range(size)]
    for number, whole in enumerate(alone):
        parts = [e for b in per_rank if b[number].scale for e in b[number].examples]
        assert sorted(map(id, parts)) == sorted(map(id, whole.examples))
    assert sorted(id(e) for b in alone for e in b.examples) == sorted(map(id, data))
    whole = stream(data, batch_size, count=position + 3)
    assert ids_of(stream(data, batch_size, position=position, count=3)) == ids_of(whole[position:])


def test_grouped_batches_have_little_padding():
    data = examples(np.random.default_rng(0).integers(4, 100, size=200).tolist())
    tokens = sum(len(example.input_ids) for example in data)
    grouped, mixed = (sum(b.input_ids.numel() for b in stream(data, 8, grouped=g)) for g in (True, False))
    assert grouped < 1.1 * tokens < 1.5 * tokens < mixed
    first, second = (ids_of(stream(data, 8, position=25 * epoch)) for epoch in (0, 1))
    assert first != second


def test_the_lengths_of_stored_examples_are_known_without_reading_them(tokenizer, tmp_path, reviews):
    from pipelines.data.sets import training_examples

    config = parse_config(minimal(tmp_path, reviews))
    data = training_examples(config.tasks * 2, tokenizer, 6, None, 0)
    assert data.lengths.tolist() == [len(example.input_ids) for example in data]
