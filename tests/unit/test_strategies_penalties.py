"""Strategies that add a penalty on parameters: EWC, CLoRA, O-LoRA."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from strategy_cases import CONFIGS, adapted, context, forward, minimise, rows

from curlora import CurloraConfig
from curlora.continual import StepOutput, TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters, write
from curlora.continual.strategies.clora import subspace
from curlora.continual.strategies.ewc import fisher_information


@pytest.mark.parametrize("kind", ["curlora", "lora"])
def test_fisher_is_the_mean_squared_gradient_by_finite_differences(model, kind):
    wrapped = adapted(model, kind).double()
    task = context("a", 1, rows("a", 5))
    fisher = fisher_information(wrapped, task, at_most=5)
    name = next(n for n in fisher if "q_proj" in n)
    parameter = adapter_parameters(wrapped)[name]
    for place in [(0, 0), (1, 2), (3, 1)]:
        squares = []
        for example in task.examples:
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[place] += sign * 1e-3
                    values.append(float(forward(wrapped, [example])[0]))
                    parameter[place] -= sign * 1e-3
            squares.append(((values[0] - values[1]) / 2e-3) ** 2)
        assert float(fisher[name][place]) == pytest.approx(np.mean(squares), rel=2e-2)  # the differences' own error
    assert all(p.grad is None for p in wrapped.parameters())


def test_ewc_is_zero_at_its_anchor_and_pulls_back_to_it(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("ewc", strength=1e3, examples=8)
    strategy.after_task(wrapped, context("a", 1, rows("a", 8)))
    assert strategy.penalty(wrapped).item() == 0
    parameters, anchor = adapter_parameters(wrapped), strategy.anchor
    moved = {name: value + 0.01 for name, value in anchor.items()}
    write(parameters, moved)
    penalty = strategy.penalty(wrapped)
    expected = 1e3 / 2 * sum(float((strategy.fisher[n] * 1e-4).sum()) for n in anchor)
    assert penalty.item() == pytest.approx(expected, rel=1e-3)
    penalty.backward()
    assert all((p.grad >= 0).all() for p in parameters.values())
    assert all(torch.allclose(p.grad, 1e3 * strategy.fisher[n] * 0.01, rtol=1e-3) for n, p in parameters.items())


def test_summed_fisher_counts_tokens_where_the_mean_divides_by_them(model):
    wrapped = adapted(model, "lora")
    examples = rows("a", 1)
    tokens = len(examples[0].input_ids) - 1
    mean = fisher_information(wrapped, context("a", 1, examples), 1)
    summed = fisher_information(wrapped, context("a", 1, examples), 1, summed=True)
    assert all(torch.allclose(summed[name], tokens * value, rtol=1e-4) for name, value in mean.items())


def test_ewc_with_a_base_holds_the_untrained_adapter_during_the_first_task_already(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("ewc", summed=True, strength=1.0, base_strength=2.0, base_rows=5, base_length=6)
    assert not strategy.plain_at_first and make_strategy("ewc").plain_at_first
    strategy.before_task(wrapped, context("a", 1, rows("a", 8)))
    assert strategy.penalty(wrapped).item() == 0
    write(adapter_parameters(wrapped), {name: value + 0.01 for name, value in strategy.base_anchor.items()})
    expected = sum(float((fisher * 1e-4).sum()) for fisher in strategy.base_fisher.values())
    assert strategy.penalty(wrapped).item() == pytest.approx(expected, rel=1e-3)
    strategy.after_task(wrapped, context("a", 1, rows("a", 8)))
    assert strategy.penalty(wrapped).item() == pytest.approx(expected, rel=1e-3)  # where the task ended is free
    with pytest.raises(ValueError, match="generates text from the base"):
        strategy.before_task(wrapped, replace(context("a", 1, rows("a", 8)), write=None))


def test_fisher_of_two_ranks_is_that_of_one(model):
    wrapped = adapted(model, "curlora")
    examples = rows("a", 7)
    alone = fisher_information(wrapped, context("a", 1, examples), 7)
    parts = []
    for rank in (0, 1):
        task = TaskContext("a", 1, 0, examples, losses=lambda m, c: forward(m, c)[0], rank=rank, size=2)
        parts.append(fisher_information(wrapped, task, 7))
    for name, value in alone.items():
        assert torch.allclose(parts[0][name] + parts[1][name], value, rtol=1e-6)


def test_clora_lowers_what_lies_in_its_subspace_and_nothing_else(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("clora", k=5)
    strategy.before_task(wrapped, context("a", 1, rows("a", 4)))
    before = strategy.penalty(wrapped).item()
    name, a = next((n, p) for n, p in adapter_parameters(wrapped).items() if ".lora_A." in n)
    p = subspace(0, name, a.shape[1], 5)
    assert torch.allclose(p.t() @ p, torch.eye(5), atol=1e-6)
    outside = (a - a @ p @ p.t()).detach()
    assert minimise(wrapped, strategy) < 1e-3 * before
    assert float((a @ p).norm()) < 0.05 * float(outside.norm())
    other = a.detach() - a.detach() @ p @ p.t()
    assert float((other - outside).norm()) < 0.5 * float(outside.norm())


def test_clora_penalty_is_the_papers(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("clora", strength=3.0, k=7)
    strategy.before_task(wrapped, context("a", 1, rows("a", 4)))
    total = 0.0
    for name, factor in adapter_parameters(wrapped).items():
        factor = factor.detach() if ".lora_A." in name else factor.detach().t()
        total += float((factor @ subspace(0, name, factor.shape[1], 7)).norm() ** 2)
    assert strategy.penalty(wrapped).item() == pytest.approx(3.0 / 2 * total, rel=1e-5)


def test_clora_refuses_a_subspace_that_fills_a_layer(model):
    with pytest.raises(ValueError, match="k is 128, but a layer has a side of 8"):
        make_strategy("clora").check(adapted(model, "lora"))


def test_olora_drives_the_row_spaces_of_two_loras_apart(model):
    wrapped = adapted(model, "lora")
    wrapped.add_adapter("frozen", CONFIGS["lora"]())
    wrapped.base_model.set_adapter(["default", "frozen"])
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".default." in name)
    strategy = make_strategy("olora", strength=1.0)
    strategy.before_task(wrapped, context("b", 2, rows("b", 4)))
    layer = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    old = layer.lora_A["frozen"].weight

    def overlap():
        return float((layer.lora_A["default"].weight @ old.t()).abs().sum())

    before, kept = overlap(), float(layer.lora_A["default"].weight.norm())
    start = strategy.penalty(wrapped).item()
    assert minimise(wrapped, strategy, 300) < 0.01 * start
    assert overlap() < 0.01 * before
    assert float(layer.lora_A["default"].weight.norm()) > 0.3 * kept  # apart, not gone
    assert not old.requires_grad


@pytest.mark.parametrize("whiten", [True, False])
def test_olora_over_curlora_is_the_row_space_overlap(model, whiten):
    config = CurloraConfig(r=3, carry="stack", whiten=whiten, selection="importance", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    for _, _, core in wrapped.base_model.cores("default"):
        core.U.data.normal_()
    wrapped.base_model.add_block()
    strategy = make_strategy("olora", strength=1.0)
    strategy.before_task(wrapped, context("b", 2, rows("b", 4)))
    if whiten:
        losses, hidden, mask, _ = forward(wrapped, rows("b", 2))
        output = StepOutput(losses.mean(), hidden, mask)
        assert strategy.loss(wrapped, [], output) is output.loss  # orthogonal by construction
        return
    expected = 0.0
    for _, layer, core in wrapped.base_model.cores("default"):
        core.U.data.normal_(std=0.1)
        with layer.base_tensors() as (weight, _):
            chosen = weight[core.rows]
            expected += float(((core.frozen[0] @ chosen[:3]) @ (core.U @ chosen[3:]).t()).abs().sum())
    assert strategy.penalty(wrapped).item() == pytest.approx(expected, rel=1e-4)
    assert minimise(wrapped, strategy) < 0.05 * expected
