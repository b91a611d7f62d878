"""Leaving CURLoRA loses nothing: LoRA by stock PEFT and the merged model compute the same logits."""

import json

import pytest
import torch
from curlora_cases import (
    logits,
    mixture_with_a_dense_block,
    mixture_with_a_shared_expert,
    randomise,
    tiny_gpt2,
    tiny_llama,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from curlora import CurloraConfig
from curlora.conversion import to_lora, to_merged

CASES = {
    "default": {},
    "raw": {"whiten": False, "scale": "none", "alpha": 2.0},
    "rsqrt": {"scale": "rsqrt", "alpha": 0.7},
    "ranks": {"rank_pattern": {"up_proj": 6, "layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "with a head": {"modules_to_save": ["lm_head"]},
    "stack": {"carry": "stack"},
    "bounded": {"max_update_norm": 0.05},
}


def trained(base, **config):
    model = get_peft_model(base, CurloraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | config)).eval()
    randomise(model)
    if config.get("carry") == "stack":
        model.base_model.add_block()
        randomise(model, seed=1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_stock_lora_gives_the_same_logits(tmp_path, case):
    model = trained(tiny_llama(), **CASES[case])
    expected = logits(model)
    to_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert (logits(loaded) - expected).abs().max() <= 1e-5
    assert (expected - logits(tiny_llama())).abs().max() > 1e-3, "the adapter does something"


def test_conv1d_converts_with_its_own_orientation(tmp_path):
    model = trained(tiny_gpt2())
    assert to_lora(model, tmp_path).fan_in_fan_out
    assert (logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path).eval()) - logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("make", [mixture_with_a_dense_block, mixture_with_a_shared_expert])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "gate_proj"]])
def test_dense_layers_that_are_named_like_fused_experts_are_not_lost(tmp_path, make, target):
    model = trained(make(), target_modules=target, exclude_modules=["shared_expert_gate"])
    expected = logits(model)
    to_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert (logits(loaded) - expected).abs().max() <= 1e-5
    assert sum(".lora_A." in name for name, _ in loaded.named_parameters()) == len(model.base_model.cores("default"))


def test_rank_and_alpha_of_the_converted_adapter(tmp_path):
    config = to_lora(trained(tiny_llama(), alpha=2.0), tmp_path / "one")
    assert (config.r, config.lora_alpha) == (4, 8)
    config = to_lora(trained(tiny_llama(), alpha=2.0, carry="stack"), tmp_path / "two")
    assert (config.r, config.lora_alpha) == (8, 16)
    assert config.target_modules == {f"{n}_proj" for n in ("q", "k", "v", "o", "up", "gate", "down")}
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "two" / "adapter_model.safetensors").values())


def test_a_directory_converts_with_the_base_it_names(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert (logits(loaded.eval()) - logits(model)).abs().max() <= 1e-5


def test_a_base_that_cannot_be_found_is_an_error_with_a_remedy(tmp_path):
    trained(tiny_llama(), task_type=None).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pass base_model="):
        to_lora(tmp_path / "adapter", tmp_path / "lora")


def test_the_merged_model_needs_no_adapter_library(tmp_path):
    model = trained(tiny_llama())
    expected = logits(model)
    to_merged(model, tmp_path)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path)) - expected).abs().max() <= 1e-4


def test_another_adapter_type_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no CURLoRA adapter 'default'"):
        to_lora(model, tmp_path)


def test_an_adapter_of_a_resized_vocabulary_converts_with_the_base_it_names(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")

    def resized():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(70)
        return base

    model = trained(resized(), target_modules=["q_proj", "lm_head"])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    to_lora(model, tmp_path / "one")
    to_lora(tmp_path / "adapter", tmp_path / "two")
    for folder in ("one", "two"):
        loaded = PeftModel.from_pretrained(resized(), tmp_path / folder).eval()
        assert (logits(loaded) - expected).abs().max() <= 1e-5
    assert (logits(to_merged(tmp_path / "adapter", tmp_path / "merged").eval()) - expected).abs().max() <= 1e-5


def test_what_peft_refuses_as_lora_is_refused_before_it_is_written(tmp_path):
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64)
    model = trained(MambaForCausalLM(config), target_modules=["in_proj", "out_proj"])
    with pytest.raises(ValueError, match=r"mixer\.out_proj: PEFT refuses a LoRA on this layer.*Use\s+to_merged"):
        to_lora(model, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    expected = logits(model)
    assert (logits(to_merged(model, tmp_path)) - expected).abs().max() <= 1e-4
