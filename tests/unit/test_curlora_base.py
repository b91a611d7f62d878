"""A base that changes under its adapter, large biases, hooks on the base, and torch.func's transforms."""

import copy
import warnings

import pytest
import torch
from curlora_cases import adapted, core_of, dense_update, layer_of, one_layer
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn import functional as F

from curlora import CurloraConfig, cur


def dense(model, x):
    """The layer's output by the definition, with the base as it is now."""
    layer = layer_of(model)
    base = layer.get_base_layer()
    update = dense_update(layer, [core_of(model).U.detach()])
    weight = base.weight.detach().double() if not layer.fan_in_fan_out else base.weight.detach().double().t()
    bias = None if base.bias is None else base.bias.detach().double()
    return F.linear(x.double(), weight + update, bias)


def hooked(model):
    layer_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    return model


# ---------------------------------------------------------------------------------------------- a changing base


def scaled(weight):
    with torch.no_grad():
        weight.mul_(1.3)


def assigned(weight):
    weight.data = weight.data + 0.1


CHANGES = {
    "in place": scaled,
    "through .data in place": lambda weight: weight.data.mul_(1.3),
    "through .data": assigned,
    "by an optimizer": lambda weight: torch.optim.SGD([weight], lr=0.5).step(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_changed_weight_is_noticed_and_the_factors_follow(change, conv1d, residual):
    model, x = adapted(one_layer(16, 14, conv1d=conv1d), r=3), torch.randn(5, 14)
    if residual:
        hooked(model)
    model(x)
    weight = layer_of(model).get_base_layer().weight
    weight.grad = torch.randn_like(weight)
    with pytest.warns(UserWarning, match="base weight of an adapted layer has changed"):
        CHANGES[change](weight)
        found = model(x)
    assert torch.allclose(found.double(), dense(model, x), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), found)


@pytest.mark.parametrize("use", ["merge", "delta", "describe", "eval"])
def test_a_changed_weight_is_noticed_by_everything_that_reads_factors(use):
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    layer = layer_of(model)
    scaled(layer.weight)
    with pytest.warns(UserWarning, match="has changed"):
        {
            "merge": model.merge_adapter,
            "delta": lambda: layer.get_delta_weight("default"),
            "describe": model.base_model.describe,
            "eval": model.train,
        }[use]()
    if use == "merge":
        model.unmerge_adapter()
    assert torch.allclose(model(x).double(), dense(model, x), atol=1e-4)


@pytest.mark.parametrize("where", ["a row", "a column", "another row"])
def test_a_part_that_changed_through_data_is_noticed_when_the_mode_changes(where):
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    core, weight = core_of(model), layer_of(model).weight
    if where == "a column":
        weight.data[:, core.cols[-1]] *= 3
    else:
        other = next(i for i in range(16) if i not in core.rows)
        weight.data[core.rows[-1] if where == "a row" else other] *= 3
    with pytest.warns(UserWarning, match="has changed"):
        model.train()
    assert torch.allclose(model(x).double(), dense(model, x), atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_a_changed_bias_needs_no_notice(residual):
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    if residual:
        hooked(model)
    with torch.no_grad():
        layer_of(model).bias.add_(3)
    assert torch.allclose(model(x).double(), dense(model, x), atol=1e-4)


@pytest.mark.parametrize("load", ["load_state_dict", "set_base_model_state_dict"])
def test_the_weights_of_another_base_may_be_loaded_under_an_adapter(load):
    model, other = adapted(one_layer(16, 14), r=3), one_layer(16, 14, seed=5)
    with pytest.warns(UserWarning, match="has changed"):
        if load == "load_state_dict":
            model.base_model.model.lin.base_layer.load_state_dict(other.lin.state_dict())
            model(torch.randn(2, 14))
        else:
            set_base_model_state_dict(model, other.state_dict())
    x = torch.randn(5, 14)
    assert torch.allclose(model(x).double(), dense(model, x), atol=1e-4)


def test_the_adapter_of_a_changed_base_loads_on_that_base(tmp_path):
    model = adapted(one_layer(16, 14), r=3)
    scaled(layer_of(model).weight)
    with pytest.warns(UserWarning, match="has changed"):
        expected = model(torch.ones(2, 14))
    model.save_pretrained(tmp_path)
    base = one_layer(16, 14)
    scaled(base.lin.weight)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(torch.ones(2, 14)), expected)


def test_a_base_that_loses_its_rank_is_refused():
    model = adapted(one_layer(16, 14), r=3)
    with torch.no_grad():
        layer_of(model).weight.copy_(torch.ones(16, 14))
    with pytest.raises(cur.SelectionError, match=r"lin: the base weight has changed.*no longer independent"):
        model(torch.ones(2, 14))


def test_what_only_moves_casts_or_copies_the_base_is_no_change():
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        layer_of(model).weight.data = layer_of(model).weight.data.clone()
        assert torch.equal(model(x), expected)
        model.merge_adapter()
        model.unmerge_adapter()
        model.train().eval()
        assert torch.allclose(model(x), expected, atol=1e-5)
        model.to(torch.bfloat16)
        model(x.to(torch.bfloat16))
        model.load_state_dict(model.state_dict())
        model(x.to(torch.bfloat16))
        with torch.inference_mode():
            adapted(one_layer(16, 14), r=3)(x)


def test_an_optimizer_that_trains_the_base_too_keeps_the_model_consistent():
    model, x = adapted(one_layer(16, 14), r=3).train(), torch.randn(5, 14)
    layer_of(model).weight.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert torch.allclose(model(x).double(), dense(model, x), atol=1e-4)


# ------------------------------------------------------------------------------------------------- large biases


@pytest.mark.parametrize("path", ["plain", "hooked", "autocast", "nested"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_large_bias_does_not_drown_the_update_in_half_precision(path, dtype, conv1d):
    """z = y[I] − b[I] would be off by what b has rounded away: 16 % at a bias of 100."""
    base = one_layer(32, 24, conv1d=conv1d)
    with torch.no_grad():
        base.lin.weight.mul_(0.1)
        base.lin.bias.fill_(100.0)
    base = base if path == "autocast" else base.to(dtype)
    model = adapted(base, r=4, whiten=False, scale="none", alpha=50.0)
    x = torch.randn(64, 24).to(torch.float32 if path == "autocast" else dtype)
    if path == "hooked":
        hooked(model)
    if path == "nested":
        inject_adapter_in_model(LoraConfig(target_modules=["lin"], r=2), model.base_model.model, "lora")
    exact = F.linear(x.double(), dense_update(layer_of(model), [core_of(model).U.detach()]))
    with torch.autocast("cpu", dtype, enabled=path == "autocast"):
        update = model(x).double() - layer_of(model).get_base_layer()(x).double()
    rounding = torch.finfo(dtype).eps * 100
    assert exact.abs().max() > 3 * rounding
    assert (update - exact).norm() < 0.05 * exact.norm() + rounding * exact.numel() ** 0.5 / 2


@pytest.mark.parametrize("residual", [False, True])
def test_a_bias_that_trains_gets_the_gradient_of_the_dense_formula(residual):
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    if residual:
        hooked(model)
    bias = layer_of(model).bias.requires_grad_(True)
    model(x).square().sum().backward()
    expected = 2 * dense(model, x).sum(dim=0)
    assert torch.allclose(bias.grad.double(), expected, rtol=1e-4, atol=1e-3)


# --------------------------------------------------------------------------------- hooks, casting and transforms


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_pre_hook"]
)
def test_hooks_on_the_base_layer_are_called(register):
    model, called = adapted(one_layer(16, 14), r=3), []
    getattr(layer_of(model).get_base_layer(), register)(lambda *_: called.append(1))
    model(torch.randn(5, 14, requires_grad=True)).sum().backward()
    assert called == [1]


def test_input_casting_can_be_switched_off():
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    base = layer_of(model).get_base_layer()
    expected = model(x)
    base.to(torch.float16)  # as diffusers keeps weights between calls, and casts them in hooks
    base.register_forward_pre_hook(lambda module, _: module.to(torch.float32) and None)
    base.register_forward_hook(lambda module, *_: module.to(torch.float16) and None)
    with disable_input_dtype_casting(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.allclose(model(x), expected, atol=0.02)


def test_torch_func_differentiates_and_vectorises():
    model, x = adapted(one_layer(16, 14), r=3), torch.randn(5, 14)
    core = core_of(model)
    name = next(n for n, _ in model.named_parameters() if n.endswith(".U"))

    def loss(u, x):
        return torch.func.functional_call(model, {name: u}, (x,)).square().sum()

    u = core.U.detach()
    model(x).square().sum().backward()
    assert torch.allclose(torch.func.grad(loss)(u, x), core.U.grad, rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(u, x)
    assert torch.allclose(each.sum(dim=0), core.U.grad, rtol=1e-4, atol=1e-4)
    several = torch.func.vmap(loss, (0, None))(torch.stack([u, 2 * u]), x)
    assert torch.allclose(several[0], loss(u, x), rtol=1e-5)
    direction = torch.randn_like(u)
    _, slope = torch.func.jvp(lambda u: loss(u, x), (u,), (direction,))
    assert torch.allclose(slope, (core.U.grad * direction).sum(), rtol=1e-4)
    hessian = torch.func.hessian(lambda u: loss(u, x))(u)
    assert torch.allclose(hessian, hessian.permute(2, 3, 0, 1), rtol=1e-3, atol=1e-3) and hessian.abs().max() > 0


# ------------------------------------------------------------------------------------------- adapters of two types


@pytest.mark.parametrize("first", ["curlora", "lora"])
def test_adapters_of_two_types_on_one_layer_add_their_updates(first):
    model, x = one_layer(16, 14), torch.randn(5, 14)
    plain = model(x)
    configs = {
        "curlora": CurloraConfig(r=3, target_modules=["lin"], init_weights=False),
        "lora": LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False),
    }
    for name in (first, *(n for n in configs if n != first)):
        inject_adapter_in_model(configs[name], model, name)
    outer = model.lin
    inner = outer.base_layer
    deltas = [layer.get_delta_weight(name) for layer in (outer, inner) for name in configs if _has(layer, name)]
    outer.set_adapter("curlora" if _has(outer, "curlora") else "lora")
    inner.set_adapter("curlora" if _has(inner, "curlora") else "lora")
    assert torch.allclose(model(x), plain + x @ sum(deltas).t(), atol=1e-4)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (inner, outer):
            layer.merge()
            assert torch.allclose(model(x), expected, atol=1e-4)
        for layer in (outer, inner):
            layer.unmerge()
            assert torch.allclose(model(x), expected, atol=1e-4)


def _has(layer, name):
    return name in getattr(layer, "curlora_core", {}) or name in getattr(layer, "lora_A", {})


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(14, 16), nn.Linear(16, 12)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def mixed_pair(**curlora):
    model = get_peft_model(Two(), CurloraConfig(r=3, init_weights=False, **curlora), adapter_name="one", mixed=True)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("targets", [["first", "second"], ["second"]])
def test_a_mixed_model_holds_adapters_of_both_types(targets):
    model, x = mixed_pair(target_modules=targets), torch.randn(5, 14)
    outputs = {}
    for active in ("one", "two", ["one", "two"]):
        model.set_adapter(active)
        outputs[str(active)] = model(x)
    with model.disable_adapter():
        assert torch.allclose(model(x), Two()(x), atol=1e-6)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 3
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"one", "two"}
    model.set_adapter(["one", "two"])
    expected = model(x)
    assert torch.allclose(copy.deepcopy(model).merge_and_unload()(x), expected, atol=1e-4)
    model.delete_adapter("two")
    assert torch.allclose(model(x), outputs["one"], atol=1e-6)
    assert torch.allclose(model.unload()(x), Two()(x), atol=1e-6)


def test_a_saved_adapter_loads_into_a_mixed_model(tmp_path):
    saved = get_peft_model(Two(), CurloraConfig(r=3, init_weights=False, target_modules=["second"])).eval()
    saved.save_pretrained(tmp_path)
    x = torch.randn(5, 14)
    loaded = PeftMixedModel.from_pretrained(Two(), tmp_path).eval()
    assert torch.equal(loaded(x), saved(x))
    model = get_peft_model(Two(), LoraConfig(r=2, target_modules=["first"]), mixed=True)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.allclose(model.eval()(x), saved(x), atol=1e-6)
