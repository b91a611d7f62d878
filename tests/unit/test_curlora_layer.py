"""Properties of one adapted layer: it computes the dense formula, in every form the configuration allows."""

import pytest
import torch
from curlora_cases import adapted, core_of, dense_update, layer_of, one_layer, orthonormal, randomise, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from curlora import CurloraConfig, cur
from curlora.names import SELECTION_RULES

RULES = tuple(SELECTION_RULES)


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32)):
    """A layer, its adapter's configuration and an input. At most half of the rows: tall factors are tame."""
    r = draw(st.integers(1, 4))
    square = draw(st.booleans())
    m = draw(st.integers(2 * r + 2, 14))
    n = m if square else draw(st.integers(2 * r + 2, 14))
    layer = {
        "out_features": m,
        "in_features": n,
        "conv1d": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 3)),
    }
    config = {
        "r": r,
        "selection": draw(st.sampled_from(RULES)),
        "whiten": draw(st.booleans()),
        "scale": draw(st.sampled_from(("adam", "rsqrt", "none"))),
        "alpha": draw(st.sampled_from((1.0, 0.3, 2.5))),
        "seed": draw(st.integers(0, 3)),
    }
    shape = draw(st.sampled_from(((5,), (2, 3), (1, 2, 2))))
    x = torch.randn(*shape, n, generator=torch.Generator().manual_seed(7)).to(layer["dtype"])
    return layer, config, x


@given(cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_new_adapter_is_the_identity(case):
    layer, config, x = case
    base = one_layer(**layer)
    expected = base(x)
    assert torch.equal(adapted(base, trained=False, **config)(x), expected)


@given(case=cases(), hooked=st.booleans())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_forward_and_gradients_equal_the_dense_formula(case, hooked):
    """Both paths: a hook on the base layer forbids the fused function, as quantised and partitioned layers do."""
    layer, config, x = case
    model = adapted(one_layer(**layer), **config)
    adapted_layer, core = layer_of(model), core_of(model)
    if hooked:
        adapted_layer.get_base_layer().register_forward_hook(lambda *_: None)
    grad = torch.randn(*x.shape[:-1], layer["out_features"], dtype=x.dtype)

    x1 = x.clone().requires_grad_()
    y1 = model(x1)
    (y1 * grad).sum().backward()

    x2, u = x.double().clone().requires_grad_(), core.U.detach().double().clone().requires_grad_()
    bias = adapted_layer.get_base_layer().bias
    weight = weight_of(adapted_layer) + dense_update(adapted_layer, [u])
    y2 = F.linear(x2, weight, None if bias is None else bias.double())
    (y2 * grad.double()).sum().backward()

    # T⁻¹ is kept in fp32, so a badly conditioned little factor shows in both dtypes.
    tolerance = 2e-6 * max(core.conditions.values()) ** 2
    for found, expected in ((y1, y2), (x1.grad, x2.grad), (core.U.grad, u.grad)):
        error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert error <= max(tolerance, 1e-5)


@given(cases(dtypes=(torch.bfloat16, torch.float16)))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_half_precision_stays_within_its_rounding(case):
    layer, config, x = case
    model = adapted(one_layer(**layer), **config)
    adapted_layer, core = layer_of(model), core_of(model)
    bias = adapted_layer.get_base_layer().bias
    weight = weight_of(adapted_layer) + dense_update(adapted_layer, [core.U.detach()])
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    found = model(x)
    condition = core.conditions["rows"] * core.conditions["columns"]
    rounding = torch.finfo(x.dtype).eps
    assert found.dtype == x.dtype
    assert (found.double() - expected).abs().max() <= 8 * rounding * condition * expected.abs().max()


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_merge_equals_forward_and_unmerge_restores(case):
    layer, config, x = case
    model = adapted(one_layer(**layer), **config)
    weight = layer_of(model).weight.detach().clone()
    expected = model(x).detach()
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))
    model.unmerge_adapter()
    assert torch.allclose(layer_of(model).weight, weight, atol=1e-6 * float(weight.abs().max()) * 100)
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merge_round_trip_is_within_rounding(dtype):
    model = adapted(one_layer(24, 20, dtype=dtype), r=4)
    weight = layer_of(model).weight.detach().clone()
    largest = (weight + layer_of(model).get_delta_weight("default")).abs().max().float()
    model.merge_adapter()
    assert not torch.equal(layer_of(model).weight, weight)
    model.unmerge_adapter()
    assert (layer_of(model).weight.float() - weight.float()).abs().max() <= torch.finfo(dtype).eps * largest


@given(cases(dtypes=(torch.float64,)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_update_norm_from_small_matrices_is_the_true_one(case):
    layer, config, _ = case
    model = adapted(one_layer(**layer), **config)
    delta = layer_of(model).get_delta_weight("default")
    assert core_of(model).update_norm() == pytest.approx(float(delta.norm()), rel=1e-4)


def test_whitened_update_norm_is_s_times_the_norm_of_u():
    model = adapted(one_layer(30, 20), r=4, scale="rsqrt", alpha=3.0)
    delta = layer_of(model).get_delta_weight("default")
    assert float(delta.norm()) == pytest.approx(3.0 / 2 * float(core_of(model).U.norm()), rel=1e-5)


@pytest.mark.parametrize("conv1d", [False, True])
def test_square_layers_are_told_apart_by_their_type(conv1d):
    """A square Conv1D that is taken for a Linear still runs, and is wrong: the defect of the authors' code."""
    model = adapted(one_layer(12, 12, conv1d=conv1d), r=3)
    layer, x = layer_of(model), torch.randn(4, 12)
    update = dense_update(layer, [core_of(model).U.detach()]).float()
    base = layer.get_base_layer()(x)
    assert torch.allclose(model(x) - base, x @ update.t(), atol=1e-4)
    assert not torch.allclose(model(x) - base, x @ update, atol=1e-2)


def test_several_active_adapters_gather_before_any_update():
    model = adapted(one_layer(16, 14), r=3)
    model.add_adapter("second", CurloraConfig(r=2, target_modules=["lin"], seed=5))
    randomise(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    layer, x = layer_of(model), torch.randn(6, 14)
    updates = [layer.get_delta_weight(name) for name in ("default", "second")]
    expected = layer.get_base_layer()(x) + x @ sum(updates).t()
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_dropout_acts_on_z_in_training_only_and_its_gradient_matches():
    model = adapted(one_layer(16, 14), r=4, dropout=0.5)
    layer, core, x = layer_of(model), core_of(model), torch.randn(200, 14)
    quiet = model(x)
    assert torch.equal(quiet, model(x))
    model.train()
    torch.manual_seed(0)
    noisy = model(x)
    noisy.sum().backward()
    found = core.U.grad.clone()
    torch.manual_seed(0)
    mask = core.mask(x)
    z = F.linear(x, layer.weight)[:, core.rows] * mask
    u = core.U.detach().clone().requires_grad_()
    (z @ (core.left @ u @ core.right).t() @ core.columns.t()).sum().backward()
    assert torch.allclose(found, u.grad, rtol=1e-4, atol=1e-5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert not torch.allclose(noisy, quiet)


def test_dropout_works_where_the_output_has_another_dtype_than_the_input():
    model = adapted(one_layer(16, 14), r=4, dropout=0.5).train()
    x = torch.randn(6, 14, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x.relu()).float().sum().backward()
    assert x.grad.dtype == torch.float32 and core_of(model).U.grad.abs().max() > 0


def test_only_z_is_kept_for_the_backward_pass():
    """tokens·r + O(r²) numbers per layer: neither its input nor its output, nor anything of its size."""
    tokens, m, n, r = 64, 48, 40, 4
    model = adapted(one_layer(m, n), r=r)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(tokens, n, requires_grad=True))
    assert tokens * r <= sum(saved.values()) <= tokens * r + 4 * r * r


def test_autocast_computes_in_bf16_and_trains_u_in_fp32():
    model = adapted(one_layer(32, 24), r=4)
    core, x = core_of(model), torch.randn(10, 24)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        assert found.dtype == torch.bfloat16
        assert core().dtype == torch.float32
        found.float().sum().backward()
    assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max()))
    assert core.U.grad.dtype == torch.float32
    in_autocast, core.U.grad = core.U.grad, None
    model(x).sum().backward()
    assert torch.allclose(in_autocast, core.U.grad, rtol=0.05, atol=0.02 * float(core.U.grad.abs().max()))


def test_casting_the_model_does_not_touch_the_whitening():
    model = adapted(one_layer(32, 24), r=4)
    core = core_of(model)
    before = core.left.clone()
    model.to(torch.bfloat16)
    assert core.columns.dtype == torch.bfloat16 and core.U.dtype == torch.bfloat16
    assert core.left.dtype == torch.float32 and torch.equal(core.left, before)
    q = core.columns.float() @ (core.left / core.norm_left[0, 0])
    assert torch.allclose(q.t() @ q, torch.eye(4), atol=0.05)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_forward_compiles_without_a_graph_break(hooked, dropout):
    model = adapted(one_layer(16, 14), r=4, dropout=dropout)
    if hooked:
        model.add_adapter("second", CurloraConfig(r=2, target_modules=["lin"]))
        model.base_model.set_adapter(["default", "second"])
    x = torch.randn(6, 14, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    found = compiled(x)
    assert torch.allclose(found, expected, atol=1e-5)
    (reference,) = torch.autograd.grad(expected.sum(), core_of(model).U)
    (gradient,) = torch.autograd.grad(found.sum(), core_of(model).U)
    assert torch.allclose(gradient, reference, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted(one_layer(16, 14), r=4)
    core, x = core_of(model), torch.randn(6, 14, requires_grad=True)
    model(x).square().sum().backward()
    expected, core.U.grad = core.U.grad.clone(), None
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    output.square().sum().backward()
    assert torch.allclose(core.U.grad, expected)


def test_a_second_backward_through_the_layer_is_refused_not_wrong():
    model = adapted(one_layer(16, 14), r=4)
    x = torch.randn(6, 14, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), core_of(model).U, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 1, 3)])
def test_the_output_can_be_changed_in_place(hooked, shape):
    """An output that were a view of what the autograd function computed would be refused."""
    model = adapted(one_layer(16, 8), r=4)
    if hooked:
        layer_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    x, gradients = torch.randn(*shape, 8, requires_grad=True), []
    for inplace in (False, True):
        y = model(x)
        nn.functional.relu(y, inplace=inplace).square().sum().backward()
        assert (y.min() == 0) == inplace
        gradients.append((x.grad, core_of(model).U.grad))
        x.grad = core_of(model).U.grad = None
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(hooked, shape, dropout):
    """Such as an expert receives to which no token is routed."""
    model = adapted(one_layer(16, 8), r=4, dropout=dropout).train()
    if hooked:
        layer_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    x = torch.randn(*shape, 8, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert y.shape == (*shape, 16) and x.grad.shape == x.shape
    assert torch.equal(core_of(model).U.grad, torch.zeros(4, 4))


# ------------------------------------------------------------------------------------------------------- bound


@given(
    whiten=st.booleans(),
    bound=st.sampled_from((1e-3, 0.05, 0.5)),
    blocks=st.integers(1, 3),
    scale=st.sampled_from(("adam", "none")),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_norm_bound_is_never_exceeded_with_a_huge_learning_rate(whiten, bound, blocks, scale):
    model = adapted(
        one_layer(20, 18), r=3, whiten=whiten, scale=scale, max_update_norm=bound, carry="stack", trained=False
    )
    layer, x = layer_of(model), torch.randn(8, 18)
    limit = bound * float(layer.weight.norm())
    target = torch.randn(8, 20)
    for block in range(blocks):
        if block:
            model.base_model.add_block()
        optimizer = torch.optim.SGD([core_of(model).U], lr=100.0)
        for step in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
            if step % 2:
                model.base_model.project()
            assert float(layer.get_delta_weight("default").norm()) <= limit * (1 + 1e-5)
            assert core_of(model).update_norm() <= limit * (1 + 1e-5)
    # The bound is reached, not merely kept: one block alone fills it. U is inside after a projection.
    if blocks == 1:
        assert core_of(model).update_norm() == pytest.approx(limit, rel=1e-3)


def test_projection_moves_u_itself_inside_the_bound():
    model = adapted(one_layer(20, 18), r=3, max_update_norm=0.1)
    core = core_of(model)
    with torch.no_grad():
        core.U.mul_(1e4)
    output = model(torch.ones(1, 18))
    model.base_model.project()
    assert float(core.shrinkage()) == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(model(torch.ones(1, 18)), output, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ stacks


@given(cases(dtypes=(torch.float64,)), st.integers(2, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_stacked_blocks_compute_the_sum_of_their_updates(case, blocks):
    layer, config, x = case
    layer |= {"out_features": 18, "in_features": 16}
    x = torch.randn(*x.shape[:-1], 16, dtype=x.dtype)
    config |= {
        "carry": "stack",
        "selection": "inverse" if config["selection"] == "activation" else config["selection"],
    }
    model = adapted(one_layer(**layer), **config)
    parts = [core_of(model).U.detach().clone()]
    for block in range(1, blocks):
        before = model(x)
        model.base_model.add_block()
        assert torch.allclose(model(x), before, atol=1e-4), "a new block starts at zero"
        randomise(model, seed=block)
        parts.append(core_of(model).U.detach().clone())
    adapted_layer = layer_of(model)
    rows, columns, _ = core_of(model).read_record()
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == blocks * config["r"]
    expected = dense_update(adapted_layer, parts)
    found = adapted_layer.get_delta_weight("default").double()
    found = found.t() if layer["conv1d"] else found
    tolerance = 1e-5 * max(core_of(model).conditions.values()) ** 2
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_whitened_blocks_are_orthogonal_and_earlier_ones_do_not_move():
    model = adapted(one_layer(24, 20), r=3, carry="stack")
    layer, first = layer_of(model), core_of(model).U.detach().clone()
    alone = layer.get_delta_weight("default")
    model.base_model.add_block()
    randomise(model, seed=1)
    both = layer.get_delta_weight("default")
    assert abs(float((alone * (both - alone)).sum())) <= 1e-5 * float(alone.norm() * (both - alone).norm())
    assert torch.allclose(core_of(model).frozen[0], first)
    q = orthonormal(weight_of(layer)[:, core_of(model).read_record()[1]])
    assert torch.allclose((q.t() @ alone.double())[3:], torch.zeros(3, 20, dtype=torch.float64), atol=1e-5)


def test_removing_the_last_block_restores_the_model_exactly():
    model = adapted(one_layer(24, 20), r=3, carry="stack")
    x = torch.randn(5, 20)
    model.base_model.add_block()
    randomise(model, seed=1)
    expected, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    model.base_model.add_block()
    randomise(model, seed=2)
    assert not torch.allclose(model(x), expected)
    model.base_model.remove_block()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert model.peft_config["default"].blocks == 2


def test_only_the_last_block_is_trained():
    model = adapted(one_layer(24, 20), r=3, carry="stack")
    model.base_model.add_block()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.lin.curlora_core.default.U"
    ]
    frozen = core_of(model).frozen.clone()
    model(torch.randn(4, 20)).sum().backward()
    assert core_of(model).U.grad.abs().max() > 0
    model.to(torch.bfloat16)
    assert torch.equal(core_of(model).frozen, frozen), "a finished task is not rounded by a cast"


def test_a_full_layer_refuses_another_block_and_changes_nothing():
    model = adapted(one_layer(12, 10), r=4, carry="stack")
    model.base_model.add_block()
    with pytest.raises(ValueError, match="3 blocks of r=4 do not fit its weight \\(12, 10\\), which holds 2"):
        model.base_model.add_block()
    assert core_of(model).settings.blocks == model.peft_config["default"].blocks == 2


# ----------------------------------------------------------------------------------------------------- selection


def test_calibration_ranks_rows_by_output_and_columns_by_input():
    base = one_layer(10, 8)
    scale = torch.tensor([5.0, 0.1, 3.0, 0.2, 4.0, 2.0, 0.3, 6.0])
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * scale
    y = F.linear(x, base.lin.weight)
    model = get_peft_model(base, CurloraConfig(r=3, selection="activation", target_modules=["lin"]))
    with pytest.raises(RuntimeError, match="calibrate"):
        model(x)
    model.base_model.calibrate([x[:250], x[250:]])
    rows, columns, _ = core_of(model).read_record()
    assert columns.tolist() == [1, 3, 6]
    assert rows.tolist() == y.square().mean(0).argsort()[:3].tolist()
    with pytest.raises(RuntimeError, match="already chosen"):
        model.base_model.calibrate([x])


def test_selection_depends_on_the_name_of_the_layer_not_on_the_order():
    """The same layer under the same name in two models, next to different others, gets the same indices."""
    layers = {name: nn.Linear(16, 16) for name in ("a", "b", "c")}

    def chosen(*names):
        model = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
        for name in names:
            model[name].load_state_dict(layers[name].state_dict())
        wrapped = adapted(model, r=4, target_modules=list(names), trained=False)
        return {n: c.read_record()[:2] for n, _, c in wrapped.base_model.cores("default")}

    forwards, backwards = chosen("a", "b", "c"), chosen("c", "b")
    for name in ("b", "c"):
        assert all(torch.equal(x, y) for x, y in zip(forwards[name], backwards[name], strict=True))
    assert not torch.equal(forwards["a"][0], forwards["b"][0])


def test_describe_reports_norms_and_conditions_of_the_factors():
    model = adapted(one_layer(16, 14), r=3)
    (record,) = model.base_model.describe()
    layer, core = layer_of(model), core_of(model)
    rows, columns, _ = core.read_record()
    c, r = weight_of(layer)[:, columns], weight_of(layer)[rows]
    assert record["module"] == "lin"
    assert record["norm_columns"] == pytest.approx(float(c.norm()))
    assert record["condition_rows"] == pytest.approx(float(torch.linalg.cond(r)))
    assert record["update_norm"] == pytest.approx(float(layer.get_delta_weight("default").norm()), rel=1e-5)


def test_a_rank_above_the_smaller_side_names_layer_shape_and_remedy():
    with pytest.raises(ValueError, match=r"lin: r=9 is larger than .* \(12, 8\); use r <= 8"):
        adapted(one_layer(12, 8), r=9)


def test_a_layer_with_dead_rows_fails_with_a_remedy():
    base = one_layer(12, 10)
    with torch.no_grad():
        base.lin.weight[2:] = 0
    with pytest.raises(cur.SelectionError, match=r"lin: selection='inverse' of 4 rows failed: 2 non-zero.*smaller r"):
        adapted(base, r=4)
