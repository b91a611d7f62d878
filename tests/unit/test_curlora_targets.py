"""The default, all linear layers, in models that hold layers which cannot be adapted as configured."""

import json
import re
import warnings

import pytest
import torch
from curlora_cases import logits, randomise, tiny_llama, tokens
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from curlora import CurloraConfig
from curlora.cur import SelectionError

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def tiny_qwen2_moe():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen2MoeConfig(
        **settings, **experts, num_key_value_heads=2, shared_expert_intermediate_size=32, vocab_size=64
    )
    return Qwen2MoeForCausalLM(config).eval()


def tiny_mamba():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64, "time_step_rank": 2}
    return MambaForCausalLM(MambaConfig(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


def attached(base, **config):
    """The model, and the text of the only warning (an empty one if there is none)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, CurloraConfig(**config))
    texts = [str(w.message) for w in caught if "CURLoRA" in str(w.message)]
    assert len(texts) <= 1
    return model, "".join(texts)


def ranks(model):
    return {name: core.settings.r for name, _, core in model.base_model.cores("default")}


def round_trip(model, base, folder, output=logits):
    randomise(model.eval())
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(output(loaded), output(model))


# --------------------------------------------------------------------------------------------------- whole models


def test_a_mixture_of_experts_trains_and_names_its_gates_and_fused_experts(tmp_path):
    model, warning = attached(tiny_qwen2_moe(), r=16)
    fused = sum(p.numel() for n, p in tiny_qwen2_moe().named_parameters() if "experts." in n and p.dim() == 3)
    share = fused / sum(p.numel() for p in tiny_qwen2_moe().parameters())
    assert "2 × model.layers.*.mlp.shared_expert_gate (r=1)" in warning and f"{share:.0%} of the parameters" in warning
    assert "2 × model.layers.*.mlp.experts.gate_up_proj" in warning and "target_parameters" in warning
    assert {r for name, r in ranks(model).items() if "shared_expert_gate" in name} == {1}
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    round_trip(model, tiny_qwen2_moe(), tmp_path)


def test_mamba_trains_on_the_layers_that_it_calls(tmp_path):
    model, warning = attached(tiny_mamba())
    assert set(ranks(model)) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}
    assert all(f"2 × backbone.layers.*.mixer.{name}" in warning for name in ("x_proj", "dt_proj", "out_proj"))
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    round_trip(model, tiny_mamba(), tmp_path)


@pytest.mark.parametrize(
    ("make", "head", "task"),
    [
        (BertForTokenClassification, "classifier", "TOKEN_CLS"),
        (BertForQuestionAnswering, "qa_outputs", "QUESTION_ANS"),
    ],
)
@pytest.mark.parametrize("with_task", [True, False])
def test_output_heads_are_left_alone_or_trained_in_full(make, head, task, with_task):
    model, warning = attached(make(BertConfig(**BERT)), task_type=task if with_task else None)
    assert len(ranks(model)) == 2 * 6 and not any(head in name for name in ranks(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and head in name}
    assert bool(trained) == with_task
    assert (head in warning) != with_task


# --------------------------------------------------------------------------------------------------- single layers


class Layers(nn.Module):
    def __init__(self, **weights) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(*weight.shape[::-1], bias=False)
            layer.weight.data = weight.clone()
            setattr(self, name, layer)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def random(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))


LOW = random(32, 5) @ random(5, 24)
REPEATED = random(4, 24).repeat_interleave(8, dim=0)


@pytest.mark.parametrize("selection", ["inverse", "uniform", "importance", "leverage", "deim"])
def test_dependent_rows_lower_the_rank_of_their_layer_only(tmp_path, selection):
    weights = {"full": random(32, 24), "low": LOW, "repeated": REPEATED, "zero": torch.zeros(32, 24)}
    model, warning = attached(Layers(**weights), r=16, selection=selection)
    found = ranks(model)
    assert found == {"full": 16, "low": 5, "repeated": 4}
    assert f"low (r={found['low']})" in warning and "rows or columns that are zero or dependent: zero" in warning
    assert "full" not in warning
    config = model.peft_config["default"]
    assert config.exclude_modules == {"zero"} and "zero" not in config.target_modules
    x = torch.randn(3, 24)
    round_trip(model, Layers(**weights), tmp_path, lambda m: m(x))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]["low"] == found["low"]


def test_a_second_adapter_may_be_smaller_than_the_first_and_nothing_remains_of_a_refused_one():
    model, _ = attached(Layers(full=random(32, 24), low=LOW), r=4)
    model.add_adapter("other", CurloraConfig(r=12))
    assert {name: core.settings.r for name, _, core in model.base_model.cores("other")} == {"full": 12, "low": 5}
    with pytest.raises(SelectionError, match="low"):
        model.add_adapter("literal", CurloraConfig(r=12, target_modules=["full", "low"]))
    assert "literal" not in model.base_model.model.low.curlora_core


def test_a_model_without_a_usable_layer_is_refused():
    with pytest.raises(SelectionError, match=r"No layer of this model can be adapted.*zero or dependent: zero"):
        get_peft_model(Layers(zero=torch.zeros(32, 24)), CurloraConfig(r=4))


def test_explicit_targets_are_taken_literally():
    with pytest.raises(ValueError, match=r"gate: r=4 is larger than the smaller side of its weight \(1, 24\)"):
        get_peft_model(Layers(gate=random(1, 24)), CurloraConfig(r=4, target_modules=["gate"]))
    with pytest.raises(SelectionError, match="low: selection='inverse' of 8"):
        get_peft_model(Layers(low=LOW), CurloraConfig(r=8, target_modules=["low"]))


def test_a_stack_leaves_out_what_holds_no_block(tmp_path):
    model, warning = attached(Layers(full=random(32, 24), gate=random(1, 24)), r=4, carry="stack")
    assert set(ranks(model)) == {"full"} and "too small for r=4: gate" in warning
    model.base_model.add_block()


def test_a_pattern_of_the_user_is_followed_where_it_fits():
    weights = {"big": random(32, 24), "gate": random(2, 24)}
    model, warning = attached(Layers(**weights), r=4, rank_pattern={"big": 6, "gate": 3})
    assert ranks(model) == {"big": 6, "gate": 2} and "gate (r=2)" in warning


def test_a_model_of_ordinary_layers_is_adapted_without_a_word():
    model, warning = attached(tiny_llama(), r=8)
    assert warning == "" and len(ranks(model)) == 14 and not model.peft_config["default"].rank_pattern


def test_the_warning_is_short_in_a_large_model():
    layers = {f"layer{i}": random(2, 24) for i in range(20)}
    _, warning = attached(Layers(**layers), r=4)
    assert len(re.findall("layer", warning)) == 8 + 1 and "and 12 more" in warning
