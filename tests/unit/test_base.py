"""The base model as a configuration names it: whole or quantised."""

import importlib.util

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines.config.loading import parse_config
from pipelines.config.sections import BaseModelConfig
from pipelines.errors import ConfigError
from pipelines.models.base import load_base, quantised_numbers
from pipelines.preflight.model import check_quantisation
from pipelines.runs.identity import base_fingerprint
from tests.conftest import minimal
from tests.unit.curlora_cases import tiny_llama


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return str(path)


def configuration(tmp_path, reviews, **changes):
    return parse_config(
        minimal(tmp_path, reviews, base_model={"path": str(tmp_path), "quantization": "4bit"}, **changes)
    )


def test_dense_layers_but_the_output_layer_are_counted():
    llama = tiny_llama(hidden_size=64, intermediate_size=128)
    inside = sum(p.numel() for name, p in llama.named_parameters() if "_proj.weight" in name)
    assert quantised_numbers(llama) == inside > 0
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    assert quantised_numbers(gpt2) == 8 * 8 * (3 + 1 + 4 + 4)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_take_the_bytes_that_are_said_and_give_the_same_gradients_after_an_evaluation(
    directory, bits
):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_base(BaseModelConfig(path=directory, dtype="float32", quantization=bits))
    layer = model.get_decoder().layers[0].mlp.down_proj
    assert layer.weight.numel() * layer.weight.element_size() == 64 * 128 // (2 if bits == "4bit" else 1)
    ids = torch.arange(3, 11)[None]
    at_first = gradient(model, ids)
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    assert torch.equal(gradient(model, ids), at_first)
    assert at_first.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, before)


def gradient(model, ids: torch.Tensor) -> torch.Tensor:
    """Of a loss by the embedded tokens: it comes through every layer."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()(inputs_embeds=embedded).logits.square().sum().backward()
    return embedded.grad


def test_the_number_of_bits_belongs_to_the_identity_of_a_base(directory):
    found = {
        base_fingerprint(BaseModelConfig(path=directory, dtype="float32", quantization=bits))
        for bits in (None, "8bit", "4bit")
    }
    assert len(found) == 3


@pytest.mark.parametrize(
    ("changes", "stage", "expected"),
    [
        ({}, 3, "ZeRO-3 cannot partition bitsandbytes weights; use deepspeed: zero2"),
        (
            {"adapter": {"type": "lora", "options": {"init_lora_weights": "pissa"}}},
            2,
            "'pissa' takes its factors from the weights",
        ),
    ],
)
def test_what_a_quantised_base_cannot_do_is_said_at_once(tmp_path, reviews, changes, stage, expected):
    config = configuration(tmp_path, reviews, **changes)
    with pytest.raises(ConfigError, match="base_model.quantization: is 4bit, but " + expected):
        check_quantisation(config, stage)


def test_a_missing_library_is_named_with_its_remedy(tmp_path, reviews, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"pip install 'bitsandbytes>=0.48' on every node, or set quantization: null"
    ):
        check_quantisation(configuration(tmp_path, reviews), 2)
