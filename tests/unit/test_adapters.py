"""Adapters through a chain: attached, saved, loaded again (also without this system), extended, taken off."""

import copy
import json

import peft
import pytest
import torch

from curlora.continual.parameters import adapter_parameters
from pipelines.config.sections import AdapterConfig
from pipelines.errors import ConfigError
from pipelines.models import adapters

INPUT = torch.tensor([[5, 9, 11, 3, 7, 20]])
LORA = {"type": "lora", "r": 2, "alpha": 4.0}
KINDS = {
    "curlora": {"type": "curlora", "r": 2},
    "curlora-stack": {"type": "curlora", "r": 2, "carry": "stack"},
    "lora": LORA,
    "lora-stack": LORA | {"carry": "stack"},
    "rslora": LORA | {"options": {"use_rslora": True}},
    "rslora-stack": LORA | {"carry": "stack", "options": {"use_rslora": True, "rank_pattern": {"k_proj": 3}}},
    "dora": LORA | {"options": {"use_dora": True}},
    "pissa": LORA | {"options": {"init_lora_weights": "pissa", "rank_pattern": {"k_proj": 3}}},
    "pissa-rslora": LORA | {"options": {"init_lora_weights": "pissa_niter_4", "use_rslora": True}},
    "olora": LORA | {"options": {"init_lora_weights": "olora"}},
    "loha": {"type": "loha", "r": 2},
    "lokr": {"type": "lokr", "r": 2},
    "ia3": {
        "type": "ia3",
        "options": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    },
    "vera": {"type": "vera", "r": 4, "options": {"target_modules": ["q_proj"]}},
    "fourierft": {"type": "fourierft", "options": {"n_frequency": 8, "init_weights": True}},
    "hra": {"type": "hra", "r": 2},
}


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=INPUT, use_cache=False).logits[0, -1].clone()


def train(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model)
    assert parameters
    for parameter in parameters.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def save(model, folder):
    folder.mkdir()
    prefix = adapters.adapter_prefix(model)
    weights = {name: t.detach().clone() for name, t in model.state_dict().items() if prefix in name}
    adapters.save_adapter(model, weights, folder)
    return folder / "adapter"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_chain_of_three_steps_is_kept_on_disk(model, tmp_path, kind):
    config = AdapterConfig(**KINDS[kind])
    bare, untouched = copy.deepcopy(model), logits(model)
    parent, after, sizes = None, untouched, set()
    for step in range(3):
        adapted = adapters.attach_adapter(model, config, 0, parent, extend=True)
        before = logits(adapted)
        assert torch.allclose(before, after, atol=1e-5)
        sizes.add(adapters.adapter_parameters(adapted))
        train(adapted, step)
        after = logits(adapted)
        assert (after - before).abs().max() > 5e-5  # VeRA's and IA³'s small vectors do little
        parent = save(adapted, tmp_path / str(step))
        model = adapters.detach_adapter(adapted)
        assert torch.equal(logits(model), untouched)
        again = adapters.attach_adapter(model, config, 0, parent)
        assert torch.allclose(logits(again), after, atol=1e-5)
        model = adapters.detach_adapter(again)
        alone = peft.PeftModel.from_pretrained(copy.deepcopy(bare), str(parent))
        assert torch.allclose(logits(alone), after, atol=1e-5)
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["curlora", "lora"])
def test_a_saved_configuration_does_not_depend_on_the_order_of_a_set(model, tmp_path, kind):
    wrapped = adapters.attach_adapter(model, AdapterConfig(**KINDS[kind]), 0)
    assert isinstance(wrapped.peft_config["default"].target_modules, set)
    names = json.loads((save(wrapped, tmp_path / "saved") / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 1
    assert names == sorted(names)


def test_a_fresh_adapter_takes_the_place_of_its_parent_but_a_finished_one_is_evaluated(model, tmp_path):
    config = AdapterConfig(**LORA, carry="fresh")
    untouched = logits(model)
    adapted = adapters.attach_adapter(model, config, 0)
    train(adapted, 0)
    after, parent = logits(adapted), save(adapted, tmp_path / "a")
    model = adapters.detach_adapter(adapted)
    finished = adapters.attach_adapter(model, config, 0, parent)
    assert torch.allclose(logits(finished), after, atol=1e-6)
    model = adapters.detach_adapter(finished)
    assert torch.equal(logits(adapters.attach_adapter(model, config, 0, parent, extend=True)), untouched)


def test_earlier_blocks_of_a_stack_do_not_train(model, tmp_path):
    config = AdapterConfig(**KINDS["lora-stack"])
    adapted = adapters.attach_adapter(model, config, 0)
    train(adapted, 0)
    parent = save(adapted, tmp_path / "a")
    second = adapters.attach_adapter(adapters.detach_adapter(adapted), config, 0, parent, extend=True)
    assert all(".default." in name for name in adapter_parameters(second))
    old = {name: p for name, p in second.named_parameters() if ".frozen." in name}
    assert old
    assert not any(p.requires_grad for p in old.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "ia3", "carry": "stack"}, "'ia3' cannot be stacked, only curlora and lora can"),
        ({"type": "prompt_tuning"}, "puts virtual tokens before the text"),
        (LORA | {"options": {"init_lora_weights": "eva"}}, "'eva' needs data or a changed base"),
        (LORA | {"carry": "stack", "options": {"init_lora_weights": "pissa"}}, "starts every block of a stack"),
        (LORA | {"carry": "stack", "options": {"use_dora": True}}, "DoRA rescales the whole weight"),
        (LORA | {"options": {"use_dora": True, "init_lora_weights": "olora"}}, "DoRA rescales the whole weight"),
    ],
)
def test_adapters_that_a_chain_cannot_keep_are_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        adapters.attach_adapter(model, AdapterConfig(**changes), 0)


def test_a_stack_is_refused_where_a_layer_holds_fewer_blocks_than_tasks(model):
    config = AdapterConfig(type="curlora", r=4, carry="stack")
    adapters.attach_final_form(copy.deepcopy(model).to("meta"), config, 0, 2)
    with pytest.raises(ConfigError, match=r"3 blocks of r=4 do not fit .* which holds 2"):
        adapters.attach_final_form(model.to("meta"), config, 0, 3)
