"""Adapters on 8 and 4 bit bases by bitsandbytes, on the CPU."""

import pytest
import torch
from curlora_cases import logits, randomise, tiny_llama, tokens
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from curlora import BaseMismatchError, CurloraConfig
from curlora.conversion import to_lora

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

QUANTISED = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load(directory, quantised=None):
    config = None if quantised is None else BitsAndBytesConfig(**QUANTISED[quantised])
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map="cpu")
    return model.eval()


@pytest.mark.parametrize("quantised", QUANTISED)
def test_an_adapter_on_a_quantised_base_starts_as_identity_and_learns(directory, quantised):
    model = get_peft_model(load(directory, quantised), CurloraConfig(r=8)).eval()
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.filterwarnings("ignore:.*quantised base differs")
def test_an_adapter_trained_in_fp32_loads_on_the_quantised_base_and_not_on_another(directory, tmp_path, quantised):
    model = get_peft_model(load(directory), CurloraConfig(r=8)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    plain, quantised_plain = logits(load(directory)), logits(load(directory, quantised))
    loaded = PeftModel.from_pretrained(load(directory, quantised), tmp_path / "adapter").eval()
    change, quantised_change = logits(model) - plain, logits(loaded) - quantised_plain
    similarity = torch.cosine_similarity(change.flatten(), quantised_change.flatten(), dim=0)
    assert similarity > 0.9, "the update does on the quantised base what it did on its own"

    tiny_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="another base model"):
        PeftModel.from_pretrained(load(tmp_path / "other", quantised), tmp_path / "adapter")


@pytest.mark.parametrize("quantised", QUANTISED)
def test_saving_and_loading_on_the_quantised_base_is_exact(directory, tmp_path, quantised):
    model = get_peft_model(load(directory, quantised), CurloraConfig(r=8)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(directory, quantised), tmp_path).eval()), logits(model))


@pytest.mark.parametrize(("quantised", "rounding"), [("8 bit", 0.012), ("4 bit", 0.12)])
def test_merge_is_within_the_rounding_of_the_quantised_weight(directory, quantised, rounding):
    model = get_peft_model(load(directory, quantised), CurloraConfig(r=8)).eval()
    randomise(model, std=1.0)
    logits(model)  # bitsandbytes repacks 4 bit weights in the first evaluation
    layers = dict(model.base_model.adapted_layers())
    before = {name: layer.get_base_weight().clone() for name, layer in layers.items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    model.merge_adapter()
    for name, layer in layers.items():
        wanted = before[name] + deltas[name]
        assert (layer.get_base_weight() - wanted).norm() < rounding * wanted.norm()
        assert deltas[name].norm() > 3 * rounding * wanted.norm()


@pytest.mark.parametrize("quantised", QUANTISED)
def test_the_converted_lora_on_the_quantised_base_gives_its_logits(directory, tmp_path, quantised):
    """The gather reads the output of the quantised product, LoRA multiplies by the dequantised rows."""
    model = get_peft_model(load(directory, quantised), CurloraConfig(r=8)).eval()
    randomise(model)
    plain, expected = logits(load(directory, quantised)), logits(model)
    to_lora(model, tmp_path)
    loaded = logits(PeftModel.from_pretrained(load(directory, quantised), tmp_path).eval())
    assert (loaded - expected).norm() < 0.1 * (expected - plain).norm()
