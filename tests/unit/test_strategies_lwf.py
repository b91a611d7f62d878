"""Learning without forgetting, alone and as part of rehearsal."""

import pytest
import torch
from strategy_cases import adapted, context, forward, rows, through_json

from curlora.continual import Example, StepOutput, make_strategy
from curlora.continual.parameters import adapter_parameters, read, swapped, write


@pytest.fixture
def head():
    """The head of an earlier task, which classifies the last real token."""
    layer = torch.nn.Linear(16, 3)
    torch.nn.init.normal_(layer.weight, std=3.0, generator=torch.Generator().manual_seed(0))

    def scores(hidden, mask):
        return {"old": layer(hidden[torch.arange(len(hidden)), mask.sum(1) - 1])}

    return scores


def classes(task: str, count: int, seed: int = 0) -> list[Example]:
    return [Example(task, row.input_ids, target=0) for row in rows(task, count, seed)]


def moved_on(wrapped, strategy, name: str = "new"):
    """Put the strategy into a second task and move the adapter; returns the weights at the start of the task."""
    strategy.before_task(wrapped, context("old", 1, classes("old", 4)))
    strategy.after_task(wrapped, context("old", 1, classes("old", 4)))
    strategy.before_task(wrapped, context(name, 2, classes(name, 4)))
    start, generator = read(adapter_parameters(wrapped)), torch.Generator().manual_seed(5)
    away = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in start.items()}
    write(adapter_parameters(wrapped), away)
    return start


@pytest.mark.parametrize("kind", ["curlora", "lora"])
def test_lwf_is_the_divergence_from_what_the_head_said_when_the_task_began(model, head, kind):
    wrapped, strategy = adapted(model, kind), make_strategy("lwf", weight=3.0, temperature=2.0)
    start = moved_on(wrapped, strategy)
    assert strategy.held_heads() == ("old",)
    batch = strategy.batch(classes("new", 5, 3))
    mine = batch[1:4]  # of one of two ranks

    def added() -> torch.Tensor:
        losses, hidden, mask, _ = forward(wrapped, mine)
        output = StepOutput(losses.mean(), hidden, mask, weight=0.5, ranks=2, held_scores=head)
        return strategy.loss(wrapped, mine, output) - output.loss

    def said() -> torch.Tensor:
        _, hidden, mask, _ = forward(wrapped, mine)
        return (head(hidden, mask)["old"] / 2).softmax(-1)

    away, extra = read(adapter_parameters(wrapped)), added()
    with torch.no_grad():
        now = said()
        with swapped(adapter_parameters(wrapped), start):
            before = said()
    divergence = (before * (before / now).log()).sum() / 5
    assert extra.item() == pytest.approx(float(3.0 * 2**2 * 0.5 * 2 * divergence), rel=1e-4)
    assert divergence > 1e-3
    extra.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in adapter_parameters(wrapped).items() if "q_proj" in n)
    assert all(torch.equal(p, away[n]) for n, p in adapter_parameters(wrapped).items()), "the trained weights are back"
    write(adapter_parameters(wrapped), start)
    assert added().item() == pytest.approx(0, abs=1e-6)


def test_lwf_goes_on_after_an_interruption_from_where_the_task_began(model, head):
    wrapped, strategy = adapted(model, "curlora"), make_strategy("lwf")
    moved_on(wrapped, strategy)
    resumed = make_strategy("lwf")
    resumed.before_task(wrapped, context("new", 2, classes("new", 4)))  # the model holds the checkpoint's weights
    resumed.load_state(*through_json(strategy.state()))
    batch = classes("new", 4)
    losses, hidden, mask, _ = forward(wrapped, batch)
    output = StepOutput(losses.mean(), hidden, mask, held_scores=head)
    found = [which.loss(wrapped, which.batch(batch), output) for which in (strategy, resumed)]
    assert torch.equal(*found)
    assert found[0] > output.loss
    strategy.after_task(wrapped, context("new", 2, batch))
    assert strategy.state() == ({}, {"tasks": ["old", "new"]}), "between tasks it keeps their names"


def test_lwf_holds_neither_the_task_that_trains_nor_one_without_a_head(model):
    wrapped, strategy = adapted(model, "curlora"), make_strategy("lwf")
    moved_on(wrapped, strategy, "old")
    assert strategy.held_heads() == ()
    strategy.after_task(wrapped, context("text", 3, rows("text", 4)))
    assert strategy.tasks == ("old",)


def test_rehearsal_holds_heads_on_new_and_replayed_rows_and_not_on_what_the_base_wrote(model, head):
    wrapped = adapted(model, "curlora")
    options = {"share": 0.3, "base_share": 0.3, "base_rows": 8, "base_length": 6, "distill": 0.0}
    strategy, alone = make_strategy("rehearsal", lwf=2.0, **options), make_strategy("lwf", weight=2.0)
    moved_on(wrapped, strategy)
    batch = strategy.batch(classes("new", 6, 3))
    real = [row for row in batch if row.task != "base"]
    assert {row.task for row in batch} == {"new", "old", "base"}
    assert {row.target for row in batch if row.task == "old"} == {-100}, "what the head said stands for the label"
    assert all(row.target == 0 for row in batch if row.task == "new")
    alone.tasks, alone.before = ("old",), strategy.heads.before
    alone.batch(real)
    added = []
    for which, examples in ((strategy, batch), (alone, real)):
        losses, hidden, mask, logits = forward(wrapped, examples)
        output = StepOutput(losses.mean(), hidden, mask, logits=logits, held_scores=head)
        added.append((which.loss(wrapped, examples, output) - output.loss).item())
    assert added[0] == pytest.approx(added[1], rel=1e-4)
    assert added[0] > 1e-3
    state = through_json(strategy.state())
    again = make_strategy("rehearsal", lwf=2.0, **options)
    again.load_state(*state)
    assert again.heads.tasks == ("old",)
    assert all(torch.equal(again.heads.before[n], t) for n, t in strategy.heads.before.items())
