"""CURLoRA through Transformers' own adapter methods, which go past `PeftModel`, and as a member of PEFT's types."""

import json
import pickle

import pytest
import torch
import transformers
from curlora_cases import adapted, logits, one_layer, randomise, tiny_llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import curlora
from curlora import BaseMismatchError, CurloraConfig


@pytest.fixture(autouse=True)
def any_peft_version(monkeypatch):
    """Transformers 5.24 asks for PEFT 0.22 before it does anything, of every type; there is none."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def load_base(base, **options):
    return AutoModelForCausalLM.from_pretrained(base, **options).eval()


def native(base, **config):
    model = load_base(base)
    model.add_adapter(CurloraConfig(**{"r": 4} | config))
    randomise(model)
    return model


def saved(base, folder, trained=True, **config):
    """An adapter that PEFT has saved, and its logits."""
    model = get_peft_model(load_base(base), CurloraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | config)).eval()
    if config.get("selection") == "activation":
        model.calibrate([tokens()])
    if config.get("carry") == "stack":
        randomise(model, seed=3)
        model.base_model.add_block()
    randomise(model)
    model.save_pretrained(folder)
    return logits(model)


# ----------------------------------------------------------------------------------------------------- the type


def test_the_type_has_what_code_expects_of_a_member_of_peft_type():
    config = CurloraConfig()
    assert config.peft_type == "CURLORA" and config.peft_type.value == config.peft_type.name == "CURLORA"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["CURLORA"] is CurloraConfig is PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type]
    assert json.loads(json.dumps(config.to_dict() | {"target_modules": None}))["peft_type"] == "CURLORA"
    assert pickle.loads(pickle.dumps(config)).peft_type is config.peft_type
    assert get_peft_config({"peft_type": "CURLORA", "r": 3}).r == 3
    status = adapted(one_layer(16, 14), r=3).get_model_status()
    assert status.peft_types == {"default": "CURLORA"}
    assert not hasattr(transformers, "CURLORA") and "CURLORA" not in list(LoraConfig().peft_type.__class__)


def test_mixing_adapter_types_is_refused_by_name():
    with pytest.raises(ValueError, match="CURLORA"):
        adapted(one_layer(16, 14), r=3).add_adapter("other", LoraConfig(target_modules=["lin"]))


# ---------------------------------------------------------------------------------------------- native methods


def test_add_train_switch_off_delete(base):
    model = native(base)
    plain, with_adapter = logits(load_base(base)), logits(model)
    assert not torch.allclose(plain, with_adapter, atol=1e-3)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"U"}
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), with_adapter)
    model.add_adapter(CurloraConfig(r=3, seed=5), "second")
    assert model.active_adapters() == ["second"] and torch.allclose(logits(model), plain, atol=1e-6)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), with_adapter)


def test_saved_natively_it_loads_in_peft_and_natively(base, tmp_path):
    model = native(base)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), tmp_path).eval()), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


@pytest.mark.parametrize(
    "config", [{}, {"selection": "activation"}, {"carry": "stack", "r": 3}, {"whiten": False, "seed": 7}]
)
@pytest.mark.parametrize("trainable", [False, True])
def test_saved_by_peft_it_loads_natively(base, tmp_path, config, trainable):
    expected = saved(base, tmp_path, **config)
    model = load_base(base)
    model.load_adapter(str(tmp_path), is_trainable=trainable)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


def test_a_second_adapter_loads_beside_the_first(base, tmp_path):
    expected = saved(base, tmp_path, seed=3)
    model = native(base)
    first = logits(model)
    model.load_adapter(str(tmp_path), "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("config", [{}, {"selection": "activation"}, {"carry": "stack", "r": 3}])
def test_another_base_is_refused_natively_and_never_computes(base, tmp_path, config):
    saved(base, tmp_path, **config)
    other = tiny_llama(seed=1)
    with pytest.raises(BaseMismatchError, match=r"layers\.0.*made for another base model"):
        other.load_adapter(str(tmp_path))
    with pytest.raises(BaseMismatchError):
        logits(other)


def test_another_base_is_refused_at_the_first_use_of_a_trainable_adapter(base, tmp_path):
    saved(base, tmp_path)
    for use in (logits, lambda model: model.train()):
        other = tiny_llama(seed=1)
        other.load_adapter(str(tmp_path), is_trainable=True)
        with pytest.raises(BaseMismatchError):
            use(other)


def test_another_base_is_refused_after_a_bare_injection(base, tmp_path):
    saved(base, tmp_path)
    config, state = CurloraConfig.from_pretrained(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError):
        set_peft_model_state_dict(inject_adapter_in_model(config, tiny_llama(seed=1)), state)


@pytest.mark.parametrize("whole_file", [False, True])
def test_a_damaged_file_is_refused_natively(base, tmp_path, whole_file):
    saved(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if whole_file:
        path.write_bytes(path.read_bytes()[:-40])
    else:
        state = load_file(path)
        state[next(key for key in state if key.endswith(".U"))][0, 1] += 1e-3
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"damaged|not fully covered|incomplete"):
        load_base(base).load_adapter(str(tmp_path))


def test_a_file_that_was_changed_on_purpose_is_sealed_again(base, tmp_path):
    saved(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    save_file({k: v * 2 if k.endswith(".U") else v for k, v in state.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"curlora\.seal"):
        PeftModel.from_pretrained(load_base(base), tmp_path)
    curlora.seal(tmp_path)
    PeftModel.from_pretrained(load_base(base), tmp_path)
