"""Factors that are rebuilt from a coarser base: the expected error is the true one, a large one is never silent."""

import warnings

import pytest
import torch
from curlora_cases import OneLayer, core_of, layer_of, randomise
from peft import PeftModel, get_peft_model
from torch import nn

from curlora import BaseMismatchError, CurloraConfig
from curlora import rounding as rounding_module

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
SIZE = 256


def base(spread: float) -> OneLayer:
    """A layer whose column norms are spread over 10**spread."""
    torch.manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(SIZE, SIZE) * 10 ** (torch.rand(SIZE) * spread - spread))
    return OneLayer(layer)


def stored_as(model: OneLayer, kind: str, nested: bool = False) -> OneLayer:
    weight = model.lin.weight.detach().clone()
    if kind == "nf4" or kind == "fp4":
        model.lin = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.float32, quant_type=kind)
        options = {"quant_type": kind, "compress_statistics": nested}
        model.lin.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    elif kind == "int8":
        model.lin = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
        model.lin.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        return model.to(getattr(torch, kind))
    return model.to("cpu")


def made(folder, spread, **config):
    """ΔW of an adapter that is trained and saved in fp32."""
    model = get_peft_model(base(spread), CurloraConfig(r=16, target_modules=["lin"], **config)).eval()
    randomise(model)
    model.save_pretrained(folder)
    return layer_of(model).get_delta_weight("default")


def load(folder, spread, kind, **options):
    return PeftModel.from_pretrained(stored_as(base(spread), kind, **options), folder).eval()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("selection", ["uniform", "inverse"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "bfloat16"])
@pytest.mark.parametrize("whiten", [True, False])
def test_the_expected_error_is_the_true_one(tmp_path, monkeypatch, kind, spread, selection, whiten, nested):
    if nested and kind not in ("nf4", "fp4"):
        pytest.skip("only 4 bit quantises its scales again")
    expected = []
    monkeypatch.setattr(rounding_module, "REFUSED", float("inf"))
    monkeypatch.setattr("curlora.record.QUANTISED_TOLERANCE", float("inf"))
    original = rounding_module.rebuild_error
    monkeypatch.setattr(rounding_module, "rebuild_error", lambda *a: expected.append(original(*a)) or expected[-1])
    wanted = made(tmp_path, spread, selection=selection, whiten=whiten)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = layer_of(load(tmp_path, spread, kind, nested=nested)).get_delta_weight("default")
    error = float((found - wanted).norm() / wanted.norm())
    assert len(expected) == 1
    if error < 0.5:
        assert error / 1.6 < expected[0] < error * 1.6
    else:
        assert expected[0] > rounding_module.NOTED, "too large to be estimated, and never silent"


@pytest.mark.parametrize(("spread", "selection"), [(2.0, "uniform"), (2.0, "inverse"), (1.4, "inverse")])
def test_factors_that_drown_in_rounding_are_refused(tmp_path, spread, selection):
    made(tmp_path, spread, selection=selection)
    with pytest.raises(BaseMismatchError, match=r"lin: (this base is stored too coarsely|the adapter was made)"):
        load(tmp_path, spread, "nf4")


def test_a_moderate_error_is_named_with_its_size(tmp_path):
    made(tmp_path, 1.4, selection="uniform")
    with pytest.warns(UserWarning, match=r"lin: .*expected error of 4\d% of the update"):
        load(tmp_path, 1.4, "nf4")


@pytest.mark.parametrize("kind", ["nf4", "int8", "bfloat16"])
def test_on_the_base_it_was_made_on_every_adapter_loads_without_a_word(tmp_path, kind):
    model = get_peft_model(stored_as(base(2.0), kind), CurloraConfig(r=16, target_modules=["lin"])).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path, 2.0, kind)
    assert torch.equal(core_of(loaded)(), core_of(model)())
