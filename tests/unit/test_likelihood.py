"""Losses without logits: equal to the definition, for models whose logits are one frozen layer and for the others."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.data.encoding import IGNORE
from pipelines.models import losses
from pipelines.models.losses import frozen_layer_losses, last_hidden, next_token_losses, plain_output_layer

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))


def gemma2():
    """A soft cap on its logits: its output layer is not the whole story."""
    config = transformers.Gemma2Config(
        **SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5
    )
    return transformers.Gemma2ForCausalLM(config)


def frozen(make):
    torch.manual_seed(0)
    model = make().eval()
    model.requires_grad_(False)
    return model


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(2, 50), st.booleans(), st.sampled_from([1, 7, 64, 1 << 20]))
def test_losses_and_gradients_are_those_of_cross_entropy(tokens, width, vocabulary, bias, chunk):
    generator = torch.Generator().manual_seed(tokens * width)
    layer = nn.Linear(width, vocabulary, bias, dtype=torch.float64).requires_grad_(False)
    hidden = (5 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.randn(tokens, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK_NUMBERS, "cpu", chunk)
        found = frozen_layer_losses(hidden, layer, targets)
    (gradient,) = torch.autograd.grad(found @ weights, hidden)
    wanted = cross_entropy(layer(hidden).float(), targets, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted @ weights, hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_a_loss_stays_finite_where_its_probability_is_zero_in_fp32():
    layer = nn.Linear(1, 2, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    assert frozen_layer_losses(torch.tensor([[200.0]]), layer, torch.tensor([1])).item() == 400


@pytest.mark.parametrize(("make", "plain"), [(llama, True), (gpt2, True), (gemma2, False)])
def test_a_pass_gives_the_losses_of_the_models_own_logits(make, plain):
    model = frozen(make)
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    targets = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.6, ids, IGNORE)
    logits = model(input_ids=ids).logits.float()
    wanted = cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none", ignore_index=IGNORE)
    for _ in range(2):  # the second pass knows what the first has found out
        found = next_token_losses(model, targets, input_ids=ids)
        torch.testing.assert_close(found.losses[:, 1:], wanted)
        assert not found.losses[:, 0].any()
        assert (plain_output_layer(model) is not None) == plain
    targets[:, 1] = ids[:, 1]
    some = next_token_losses(model, targets, input_ids=ids).logits([2, 0], 5)
    torch.testing.assert_close(some, model(input_ids=ids).logits[[2, 0], :5])


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
def test_the_last_hidden_states_are_those_that_the_model_would_hand_out(make):
    model = frozen(make)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    hidden, logits = last_hidden(model, input_ids=ids)
    output = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(hidden, output.hidden_states[-1])
    assert torch.equal(logits, output.logits)


def test_an_output_layer_that_trains_gets_its_gradient():
    model = frozen(llama)
    model.lm_head.requires_grad_(True)
    ids = torch.tensor([[3, 4, 5, 6]])
    next_token_losses(model, ids, input_ids=ids).losses.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("targets", [[IGNORE] * 4, [3, IGNORE, IGNORE, IGNORE]])
def test_without_a_target_there_is_no_loss(targets):
    found = next_token_losses(frozen(llama), torch.tensor([targets]), input_ids=torch.tensor([[3, 4, 5, 6]]))
    assert not found.losses.any()
    assert found.hidden.shape == (1, 4, 16)


def test_no_logits_of_the_batch_are_kept_for_the_backward_pass():
    model = frozen(llama)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = torch.randint(3, 40, (4, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        next_token_losses(model, ids, input_ids=ids).losses.sum().backward()
    assert kept
    assert not [shape for shape in kept if shape[-1:] == (40,) and shape.numel() >= 4 * 31 * 40]
