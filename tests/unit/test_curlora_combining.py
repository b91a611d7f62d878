"""Weighted sums of adapters are exact, and an adapter is swapped for another without recompiling."""

import pytest
import torch
from curlora_cases import logits, randomise, reseeded, tiny_llama, tokens
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

import curlora
from curlora import CurloraConfig

QKV = ["q_proj", "k_proj", "v_proj"]
CHANGED = {"other rank": {"r": 3}, "fewer": {"target_modules": ["q_proj"]}, "raw": {"whiten": False}}


def pair(base=None, second=None, **config):
    config = {"r": 4, "target_modules": QKV} | config
    model = get_peft_model(base or tiny_llama(), CurloraConfig(**config), adapter_name="one")
    model.add_adapter("two", CurloraConfig(**config | (second or {})))
    return reseeded(model)


def deltas(model, adapter):
    return {name: layer.get_delta_weight(adapter) for name, layer, _ in model.base_model.cores(adapter)}


# ---------------------------------------------------------------------------------------------- weighted sums


@pytest.mark.parametrize(
    ("config", "second"),
    [
        ({}, {}),
        ({"whiten": False, "scale": "none"}, {}),
        ({"scale": "rsqrt"}, {"alpha": 2.5}),
        ({"alpha_pattern": {"k_proj": 0.3}}, {"dropout": 0.1}),
        ({}, {"max_update_norm": 0.01}),
        ({"rank_pattern": {"v_proj": 2}}, {}),
    ],
)
def test_the_sum_of_adapters_is_the_sum_of_their_updates(tmp_path, config, second):
    model = pair(second=second, **config)
    model.base_model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum")
    a, b, total = (deltas(model, name) for name in ("one", "two", "sum"))
    for name in total:
        wanted = 0.7 * a[name] - 0.4 * b[name]
        assert (total[name] - wanted).norm() <= 1e-5 * wanted.norm()
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum").eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


def test_adapters_on_different_layers_and_stacks_are_added():
    model = pair(second={"target_modules": ["v_proj", "up_proj"]}, carry="stack")
    for name in ("one", "two"):
        model.base_model.add_block(name)
    reseeded(model)
    model.base_model.add_weighted_adapter(["one", "two"], [2.0, 0.5], "sum")
    a, b, total = (deltas(model, name) for name in ("one", "two", "sum"))
    assert total.keys() == a.keys() | b.keys()
    for name, found in total.items():
        wanted = 2 * a.get(name, 0) + 0.5 * b.get(name, 0)
        assert torch.allclose(found, wanted, atol=1e-5)
    model.set_adapter("sum")
    model(tokens(), labels=tokens()).loss.backward()


def test_the_mean_of_an_adapter_and_its_start_is_half_of_it():
    model = pair()
    model.base_model.add_weighted_adapter(["one"], [0.5], "middle")
    a, half = deltas(model, "one"), deltas(model, "middle")
    assert all(torch.allclose(half[name], a[name] / 2, atol=1e-6) for name in a)


@pytest.mark.parametrize(
    ("second", "call", "message"),
    [
        ({"seed": 3}, {}, "q_proj: the adapters .* differ in their rows and columns"),
        ({"whiten": False}, {}, "differ in their rows and columns, in blocks, whiten or scale"),
        ({"scale": "rsqrt"}, {}, "whiten or scale"),
        ({}, {"weights": [1.0]}, "2 adapters need as many weights, but there are 1"),
        ({}, {"adapters": ["one", "three"]}, "Adapter 'three' does not exist"),
        ({}, {"adapter_name": "two"}, "Adapter 'two' already exists"),
        ({}, {"combination_type": "ties"}, "combination_type='ties' is not possible"),
    ],
)
def test_what_is_no_exact_sum_is_refused_and_changes_nothing(second, call, message):
    model = pair(second=second)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum"} | call
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(**arguments)
    assert model.state_dict().keys() == before.keys() and set(model.peft_config) == {"one", "two"}


# --------------------------------------------------------------------------------------------------- hot swap


@pytest.fixture
def folders(tmp_path):
    """Two adapters with other rows, columns, alphas and rules, and their logits."""
    expected = {}
    for number, config in enumerate(({}, {"seed": 4, "alpha": 2.0, "selection": "deim", "scale": "rsqrt"})):
        model = get_peft_model(tiny_llama(), CurloraConfig(r=4, target_modules=QKV, **config)).eval()
        randomise(model, seed=number)
        model.save_pretrained(tmp_path / str(number))
        expected[number] = logits(model)
    return tmp_path, expected


def test_adapters_are_swapped_without_recompiling(folders):
    folder, expected = folders
    model = PeftModel.from_pretrained(tiny_llama(), folder / "0").eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number in (0, 1, 0, 1):
        model.base_model.hotswap_adapter(folder / str(number))
        assert torch.allclose(logits(compiled), expected[number], atol=1e-5)
        assert torch.equal(logits(model), expected[number])
    assert counter.frame_count == 1
    assert model.peft_config["default"].alpha == 2.0
    model.save_pretrained(folder / "again")
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / "again").eval()
    assert torch.equal(logits(loaded), expected[1])


def test_a_swap_that_fails_leaves_the_adapter_as_it_was(folders, tmp_path):
    folder, expected = folders
    model = PeftModel.from_pretrained(tiny_llama(), folder / "0").eval()
    other = get_peft_model(tiny_llama(seed=1), CurloraConfig(r=4, target_modules=QKV))
    other.save_pretrained(tmp_path / "other base")
    for name, config in CHANGED.items():
        config = CurloraConfig(**{"r": 4, "target_modules": QKV} | config)
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / name)
    for name, message in {
        "other base": "made for another base model",
        "other rank": "another r",
        "fewer": "lacks 8 entries",
        "raw": "whiten=False instead of True",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.base_model.hotswap_adapter(tmp_path / name)
        assert torch.equal(logits(model), expected[0])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge"):
        model.base_model.hotswap_adapter(folder / "1")
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected[0], atol=1e-5)


def test_a_damaged_file_is_not_swapped_in(folders):
    folder, expected = folders
    model = PeftModel.from_pretrained(tiny_llama(), folder / "0").eval()
    path = folder / "1" / "adapter_model.safetensors"
    state = load_file(path)
    state[next(key for key in state if key.endswith(".U"))][0, 1] += 1
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="damaged"):
        model.base_model.hotswap_adapter(folder / "1")
    assert torch.equal(logits(model), expected[0])
    curlora.seal(folder / "1")
    model.base_model.hotswap_adapter(folder / "1")
