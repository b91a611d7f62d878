"""Strategies that average weights: I-LoRA over steps, CoMA over tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from strategy_cases import adapted, context, forward, rows, train

from curlora.continual import Example, StepOutput, make_strategy
from curlora.continual.parameters import adapter_parameters, read, swapped, write
from curlora.continual.passes import hidden_with


def test_the_slow_copy_moves_and_is_the_closed_form_average(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("ilora", decay=0.75)
    fast = [read(adapter_parameters(wrapped))]
    train(
        wrapped,
        strategy,
        context("only", 1, rows("only", 24)),
        steps=6,
        on_step=lambda step: fast.append(read(adapter_parameters(wrapped))),
    )
    rates = [min(1 - 1 / (t + 1), 0.75) for t in range(1, 7)]
    weights = [np.prod(rates)] + [(1 - rates[i]) * np.prod(rates[i + 1 :]) for i in range(6)]
    assert sum(weights) == pytest.approx(1)
    for name, slow in strategy.evaluation_weights(wrapped).items():
        average = sum(w * values[name].double() for w, values in zip(weights, fast, strict=True))
        assert torch.allclose(slow.double(), average, atol=1e-6)
        assert not torch.allclose(slow, fast[0][name], atol=1e-4)
        assert not torch.allclose(slow, fast[-1][name], atol=1e-4)


@pytest.mark.parametrize("steps", [5, 400])
def test_turnover_leaves_the_same_part_of_the_past_whatever_the_number_of_steps(model, steps):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("ilora", turnover=2.0)
    strategy.before_task(wrapped, replace(context("a", 1, rows("a", 8)), steps=steps))
    strategy.steps = 10**6  # far from the start, where λ is the plain mean's
    strategy.slow = {name: torch.ones_like(value) for name, value in strategy.slow.items()}
    write(adapter_parameters(wrapped), {name: torch.zeros_like(value) for name, value in strategy.slow.items()})
    for step in range(1, steps + 1):
        strategy.after_step(wrapped, step)
    left = float(next(iter(strategy.slow.values())).flatten()[0])
    assert left == pytest.approx((1 - 2 / steps) ** steps, rel=1e-3) and 0.05 < left < 0.14
    with pytest.raises(ValueError, match="number of optimizer steps"):
        strategy.before_task(wrapped, replace(context("a", 1, rows("a", 8)), steps=0))


def test_consistency_is_the_masked_error_against_the_slow_copy(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("ilora", consistency=2.0)
    old = rows("old", 8)
    strategy.before_task(wrapped, context("old", 1, old))
    strategy.after_task(wrapped, context("old", 1, old))
    strategy.slow = {name: 0.5 * value for name, value in strategy.slow.items()}
    batch = rows("new", 2, 5) + strategy.reservoir.draw(3, [0])
    losses, hidden, mask, _ = forward(wrapped, batch)
    output = StepOutput(losses.mean(), hidden, mask, weight=0.5, replayed=3)
    before = read(adapter_parameters(wrapped))
    extra = strategy.loss(wrapped, batch, output) - output.loss
    value = extra.item()
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(wrapped).items())
    with torch.no_grad():
        fast = [forward(wrapped, [row])[1][0] for row in batch[2:]]
        with swapped(adapter_parameters(wrapped), strategy.slow):
            slow = [forward(wrapped, [row])[1][0] for row in batch[2:]]
    errors = [(a - b).square().mean() for a, b in zip(fast, slow, strict=True)]
    assert value == pytest.approx(2.0 * 0.5 * float(sum(errors)) / 3, rel=1e-4)
    assert value > 0
    extra.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapter_parameters(wrapped).items() if "q_proj" in n)


def test_a_second_pass_keeps_packed_documents_apart_as_training_does(model):
    wrapped = adapted(model, "lora")
    packed = Example("t", (3, 4, 5, 6, 7, 8, 9), (3, 4, 5, 6, 7, 8, 9), breaks=(3,))
    other = Example("t", (5, 4), (5, 4))
    mask = torch.tensor([[1] * 7, [1] * 2 + [0] * 5])
    with torch.no_grad():
        found = hidden_with(wrapped, read(adapter_parameters(wrapped)), [packed, other], mask)
        parts = [forward(wrapped, [Example("t", ids)])[1][0] for ids in ((3, 4, 5), (6, 7, 8, 9), (5, 4))]
    assert torch.allclose(found[0], torch.cat(parts[:2]), atol=1e-5)
    assert torch.allclose(found[1, :2], parts[2], atol=1e-5)


def test_fast_and_slow_go_on_separately_into_the_next_task(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("ilora")
    train(wrapped, strategy, context("first", 1, rows("first", 24)))
    fast, slow = read(adapter_parameters(wrapped)), strategy.evaluation_weights(wrapped)
    write(adapter_parameters(wrapped), slow)  # what is published and loaded again
    strategy.before_task(wrapped, context("second", 2, rows("second", 8)))
    assert all(torch.equal(p, fast[n]) for n, p in adapter_parameters(wrapped).items())
    assert all(torch.equal(strategy.slow[n], slow[n]) for n in slow)


def test_coma_publishes_the_average_of_before_and_after_and_goes_on_from_there(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("coma", weight=0.25)
    for position, task in enumerate(("first", "second"), 1):
        before = read(adapter_parameters(wrapped))
        train(wrapped, strategy, context(task, position, rows(task, 24, position)))
        after, published = read(adapter_parameters(wrapped)), strategy.evaluation_weights(wrapped)
        for name in after:
            assert not torch.allclose(before[name], after[name], atol=1e-4)
            assert torch.allclose(published[name], 0.75 * before[name] + 0.25 * after[name], atol=1e-6)
        write(adapter_parameters(wrapped), published)  # what is published and loaded again


@pytest.mark.parametrize(("name", "options"), [("coma", {}), ("replay", {"share": 0.0}), ("replay", {"size": 0})])
def test_what_replays_nothing_keeps_no_rows(model, name, options):
    wrapped, strategy = adapted(model, "curlora"), make_strategy(name, **options)
    for position, task in enumerate(("first", "second"), 1):
        train(wrapped, strategy, context(task, position, rows(task, 12, position)))
    assert len(strategy.reservoir) == 0
    assert {key for key in strategy.state()[0] if not key.startswith("before.")} == make_state_keys(name, options)
    assert strategy.held_heads() == ()


def make_state_keys(name: str, options: dict) -> set[str]:
    """The tensors' names in the state of a strategy that has seen no task."""
    return set(make_strategy(name, **options).state()[0])


def test_coma_over_curlora_averages_the_models_themselves(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("coma", weight=0.5)
    deltas = {}
    layer = next(m for m in wrapped.modules() if hasattr(m, "get_delta_weight"))
    deltas["before"] = layer.get_delta_weight("default").detach().clone()
    train(wrapped, strategy, context("only", 1, rows("only", 24)))
    deltas["after"] = layer.get_delta_weight("default").detach().clone()
    write(adapter_parameters(wrapped), strategy.evaluation_weights(wrapped))
    found = layer.get_delta_weight("default")
    assert torch.allclose(found, (deltas["before"] + deltas["after"]) / 2, atol=1e-6)
    assert not torch.allclose(found, deltas["after"], atol=1e-5)
