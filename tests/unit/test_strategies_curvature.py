"""The curvature strategy: K-FAC in the coordinates of adapters with frozen factors."""

import peft
import pytest
import torch
from strategy_cases import adapted, context, forward, rows, through_json, train

from curlora import CurloraConfig
from curlora.continual import make_strategy
from curlora.continual.curvature import coherence, measure, observed, pooled, predictions, proximal, quadratic
from curlora.continual.parameters import adapter_parameters, write
from curlora.names import BASE_TASK


def layer_of(model, name):
    return model.get_submodule(name.partition(".curlora_core")[0])


def passes(model, examples):
    """Name → x and y's gradient of every token under the summed loss: what full-space K-FAC is made of."""
    seen, handles = {}, []
    for name in adapter_parameters(model):
        layer = layer_of(model, name)

        def after(module, inputs, output, name=name):
            x = inputs[0].detach()
            output.register_hook(lambda g: seen.update({name: (x.flatten(0, 1), g.flatten(0, 1))}))

        handles.append(layer.register_forward_hook(after))
    losses = forward(model, examples)[0]
    counts = torch.tensor([float(predictions(e)) for e in examples])
    torch.autograd.grad((losses * counts).sum(), list(adapter_parameters(model).values()))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("whiten", [True, False])
def test_the_penalty_is_full_space_kfac_restricted_to_the_adapter(model, whiten):
    config = CurloraConfig(r=4, whiten=whiten, selection="importance", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).double().eval()
    examples = rows("a", 6)
    factors = measure(wrapped, context("a", 1, examples), examples, draw=False)
    seen = passes(wrapped, examples)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter_parameters(wrapped).items():
        x, g = seen[name]
        layer, core = layer_of(wrapped, name), layer_of(wrapped, name).curlora_core["default"]
        moved = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        before = layer.get_delta_weight("default")
        parameter.data += moved
        delta = layer.get_delta_weight("default") - before  # (m, n)
        parameter.data -= moved
        c = g @ core.columns.double() @ core.left.double()
        weights = c.square().sum(-1, keepdim=True)
        outputs = g.t() @ g / sum(map(predictions, examples))
        inputs = (weights * x).t() @ x / weights.sum()
        expected = float(torch.trace(outputs @ delta @ inputs @ delta.t())) / 2
        found = float(quadratic(moved, factors.outputs[name].double(), factors.inputs[name].double()))
        assert expected > 0 and found == pytest.approx(expected, rel=1e-4)


def test_the_trace_is_that_of_the_exact_sum_over_tokens(model):
    wrapped, examples = adapted(model, "curlora").double().eval(), rows("a", 6)
    factors = measure(wrapped, context("a", 1, examples), examples, draw=False)
    total: dict[str, float] = {}

    def see(name, z, c):
        total[name] = total.get(name, 0.0) + float((z.square().sum(-1) * c.square().sum(-1)).sum())

    with observed(wrapped, see):
        losses = forward(wrapped, examples)[0]
        counts = losses.new_tensor([predictions(e) for e in examples])
        (losses * counts).sum().backward()
    for name, value in total.items():
        product = float(factors.outputs[name].trace() * factors.inputs[name].trace())
        assert product == pytest.approx(value / sum(map(predictions, examples)), rel=1e-4)


def test_c_and_z_give_the_gradient(model):
    """∂L/∂U = Σ c zᵀ: the observer sees what autograd sees, also when checkpointing runs every forward twice."""
    wrapped, examples = adapted(model, "curlora"), rows("a", 3)
    for checkpointing in (False, True):
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
            wrapped.enable_input_require_grads()
            wrapped.train()
        found = {}

        def see(name, z, c, found=found):
            found[name] = found.get(name, 0) + c.t() @ z

        with observed(wrapped, see):
            parameters = adapter_parameters(wrapped)
            gradients = torch.autograd.grad(forward(wrapped, examples)[0].sum(), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name


def test_padding_changes_nothing(model):
    wrapped, examples = adapted(model, "curlora").double().eval(), rows("a", 5)
    together = measure(wrapped, context("a", 1, examples), examples, draw=False)
    alone = [measure(wrapped, context("a", 1, [e]), [e], draw=False) for e in examples]
    counts = [predictions(e) for e in examples]
    for name, outputs in together.outputs.items():
        mean = sum(n * one.outputs[name] for n, one in zip(counts, alone, strict=True)) / sum(counts)
        assert torch.allclose(outputs, mean, rtol=1e-4, atol=1e-9)


def random_psd(generator, *shape):
    half = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return half @ half.mT


def test_a_small_proximal_step_is_a_gradient_step_and_a_large_one_projects():
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = random_psd(generator, 3, 4, 4), random_psd(generator, 3, 4, 4)
    moved = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(quadratic(moved, outputs, inputs), moved)
    differences = []
    for step in (1e-4, 1e-5):
        change = (moved - proximal(moved, outputs, inputs, step)) / step
        differences.append(float((change - gradient).detach().norm() / gradient.norm()))
    assert differences[0] < 0.02 and differences[1] == pytest.approx(differences[0] / 10, rel=0.1), "of first order"
    step = 0.3
    found = proximal(moved, outputs, inputs, step).detach().requires_grad_()
    (there,) = torch.autograd.grad(quadratic(found, outputs, inputs), found)
    assert torch.allclose(found + step * there, moved, atol=1e-10), "the implicit gradient step"
    flat = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    far = proximal(moved, flat, torch.eye(4, dtype=torch.float64), 1e12)
    assert torch.allclose(far[..., 3, :], moved[..., 3, :]) and float(far[..., :3, :].abs().max()) < 1e-10


def test_pooling_is_exact_where_one_product_is_enough_and_never_far_off():
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = random_psd(generator, 2, 3, 3), random_psd(generator, 2, 3, 3)
    gamma, s = pooled(torch.stack([outputs, 2 * outputs]), torch.stack([inputs, 3 * inputs]))
    for layer in range(2):
        wanted = (1 + 6) * torch.kron(outputs[layer], inputs[layer])
        assert torch.allclose(torch.kron(gamma[layer], s[layer]), wanted, rtol=1e-8)
    gammas, ss = random_psd(generator, 3, 4, 4), random_psd(generator, 3, 4, 4)
    gamma, s = pooled(gammas, ss)
    exact = sum(torch.kron(a, b) for a, b in zip(gammas, ss, strict=True))
    assert float((torch.kron(gamma, s) - exact).norm() / exact.norm()) < 0.6
    assert float(torch.linalg.eigvalsh(gamma).min()) > 0


# -------------------------------------------------------------------------------------------------- the strategy

SMALL = {"examples": 8, "base_rows": 8, "base_length": 8}


def test_the_penalty_is_zero_where_every_task_left_the_adapter_and_pulls_back_to_it(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("curvature", strength=7.0, base_strength=0.0, **SMALL)
    task = context("a", 1, rows("a", 8))
    strategy.before_task(wrapped, task)
    assert not strategy.kept, "the base writes nothing that has no weight"
    strategy.after_task(wrapped, task)
    assert strategy.penalty(wrapped).item() == 0
    parameters, (factors, anchor) = adapter_parameters(wrapped), strategy.kept["a"]
    write(parameters, {name: value + 0.01 for name, value in anchor.items()})
    penalty = strategy.penalty(wrapped)
    penalty.backward()
    total = 0.0
    for name, parameter in parameters.items():
        ones = torch.full_like(anchor[name], 0.01)
        pull = 7.0 * factors.outputs[name] @ ones @ factors.inputs[name]
        assert torch.allclose(parameter.grad, pull, rtol=1e-3, atol=1e-9)
        total += float((pull * ones).sum()) / 2
    assert penalty.item() == pytest.approx(total, rel=1e-3)


def test_the_base_is_task_zero_around_the_untrained_adapter(model):
    wrapped = peft.get_peft_model(model, CurloraConfig(r=4, task_type="CAUSAL_LM"))
    strategy = make_strategy("curvature", **SMALL)
    strategy.before_task(wrapped, context("a", 1, rows("a", 8)))
    assert list(strategy.kept) == [BASE_TASK]
    assert all(not anchor.any() for anchor in strategy.kept[BASE_TASK].anchor.values())
    assert strategy.penalty(wrapped).item() == 0
    before = strategy.kept
    strategy.before_task(wrapped, context("b", 2, rows("b", 8)))
    assert strategy.kept is before, "the base is measured once, before the first task"


def test_calibration_multiplies_by_what_a_probe_has_cost_and_leaves_the_weights(model):
    found = {}
    for calibrate in (False, True):
        wrapped = peft.get_peft_model(model, CurloraConfig(r=4, task_type="CAUSAL_LM"))
        strategy = make_strategy("curvature", calibrate=calibrate, **SMALL)
        strategy.before_task(wrapped, context("a", 1, rows("a", 8)))
        assert not any(value.any() for value in adapter_parameters(wrapped).values()), "where it was"
        found[calibrate] = strategy
        model = wrapped.unload()
    assert found[False].coherence == 1.0 < found[True].coherence
    for name, gamma in found[True].kept[BASE_TASK].factors.outputs.items():
        plain = found[False].kept[BASE_TASK].factors.outputs[name]
        assert torch.allclose(gamma, found[True].coherence * plain, rtol=1e-5)
    again = make_strategy("curvature", **SMALL)
    again.load_state(*through_json(found[True].state()))
    assert again.coherence == found[True].coherence, "later tasks and resumed ones go on with it"


def test_a_probe_measures_what_the_exact_change_is(model):
    """Of the loss along the sign of the gradient, at a step for which the factors predict 0.02 nats."""
    wrapped, written, examples = adapted(model, "curlora"), rows("base", 8, 1), rows("a", 8)
    task = context("a", 1, examples)
    factors = measure(wrapped, task, written, draw=False)
    found = coherence(wrapped, task, factors, written, examples)
    parameters, counts = adapter_parameters(wrapped), torch.tensor([float(predictions(e)) for e in examples])
    gradients = torch.autograd.grad((forward(wrapped, examples)[0] * counts).sum(), list(parameters.values()))
    ways = {name: -gradient.sign() for name, gradient in zip(parameters, gradients, strict=True)}
    unit = sum(float(quadratic(way, factors.outputs[name], factors.inputs[name])) for name, way in ways.items())
    weights = torch.tensor([float(predictions(e)) for e in written])

    def loss() -> float:
        return float((forward(wrapped, written)[0] * weights).sum() / weights.sum())

    before = loss()
    write(parameters, {name: p.detach() + (0.02 / unit) ** 0.5 * ways[name] for name, p in parameters.items()})
    assert found == pytest.approx(max((loss() - before) / 0.02, 1.0), rel=1e-3)


def test_tasks_are_kept_in_kilobytes_and_pooled_ones_in_constant_memory(model):
    wrapped = adapted(model, "curlora")
    sizes = {}
    for pool in (False, True):
        strategy = make_strategy("curvature", pool=pool, **SMALL)
        sizes[pool] = []
        for position in (1, 2, 3):
            train(wrapped, strategy, context(f"t{position}", position, rows("a", 8, position)), steps=2)
            tensors, _ = strategy.state()
            sizes[pool].append(sum(t.numel() for key, t in tensors.items() if not key.startswith("memory.")))
    numbers = sum(p.numel() for p in adapter_parameters(wrapped).values())
    assert sizes[False] == [6 * numbers, 9 * numbers, 12 * numbers], "Γ, S and the anchor of the base and each task"
    assert sizes[True] == [6 * numbers] * 3


def test_training_stays_nearer_to_the_earlier_task(model):
    """What the penalty is for: after a second task, the first one's predictions have changed less."""
    divergence = {}
    for strength in (0.0, 1e4):
        wrapped = adapted(model, "curlora")
        first, second = rows("a", 12, 1), rows("b", 12, 2)
        strategy = make_strategy("curvature", strength=strength, base_strength=0.0, **SMALL)
        train(wrapped, strategy, context("a", 1, first), steps=10)
        before = forward(wrapped, first)[3](range(12), 3).detach().log_softmax(-1)
        train(wrapped, strategy, context("b", 2, second), steps=30)
        after = forward(wrapped, first)[3](range(12), 3).detach().log_softmax(-1)
        divergence[strength] = float((before.exp() * (before - after)).sum(-1).mean())
        model = wrapped.unload()
    assert divergence[1e4] < 0.5 * divergence[0.0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.LoraConfig(r=4, target_modules="all-linear"), "trains 2 parameters, but the curvature"),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), r"a parameter of shape \(8, 1\)"),
        (lambda: CurloraConfig(r=4, max_update_norm=0.5), "has max_update_norm, which rescales U"),
        (lambda: CurloraConfig(r=4, carry="stack", blocks=2), "has a stack of blocks"),
    ],
)
def test_adapters_without_frozen_factors_are_refused_with_the_reason(model, config, reason):
    wrapped = peft.get_peft_model(model, config())
    with pytest.raises(ValueError, match=reason):
        make_strategy("curvature").check(wrapped)


def test_peft_adapters_with_one_matrix_between_frozen_factors_are_measured_alike(model):
    settings = {"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False}
    config = pytest.importorskip("peft").PsoftConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)
    wrapped, examples, found = peft.get_peft_model(model, config), rows("a", 3), {}

    def see(name, z, c):
        found[name] = found.get(name, 0) + c.t() @ z

    with observed(wrapped, see):
        parameters = adapter_parameters(wrapped)
        gradients = torch.autograd.grad(forward(wrapped, examples)[0].sum(), list(parameters.values()))
    assert len(parameters) == 4
    for name, gradient in zip(parameters, gradients, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-6), name
