"""The memory of earlier tasks, and the strategies that draw on it: replay and rehearsal."""

from collections import Counter

import pytest
import torch
from strategy_cases import adapted, context, forward, rows, through_json, write_

from curlora.continual import Example, StepOutput, make_strategy
from curlora.continual.memory import ReservoirMemory
from curlora.continual.parameters import adapter_parameters, read, write


def test_the_reservoir_is_uniform_over_everything_it_has_seen():
    counts = Counter()
    trials, capacity = 3000, 4
    for seed in range(trials):
        memory = ReservoirMemory(capacity)
        for task, size in (("a", 3), ("b", 6), ("c", 11)):
            memory.add_task(task, [Example(task, (i,)) for i in range(size)], seed)
        assert len(memory) == capacity
        counts.update((row.task, row.input_ids) for row in memory.rows)
    expected = trials * capacity / 20
    chi_square = sum((counts[key] - expected) ** 2 / expected for key in counts) * 20 / 16
    assert len(counts) == 20
    assert chi_square < 43.8  # 99.9 % of a χ² distribution with 19 degrees of freedom


def test_no_row_enters_twice():
    memory = ReservoirMemory(100)
    task = rows("a", 10)
    memory.add_task("a", task, 0)
    memory.add_task("a", task, 0)
    memory.add_task("b", memory.draw(5, [1]) + rows("b", 3, 1), 0)
    assert memory.seen == len(memory) == 13
    assert len(set(memory.rows)) == 13
    assert not any(row.replayed for row in memory.rows)


def test_memory_survives_its_own_serialisation():
    memory = ReservoirMemory(8)
    memory.add_task(
        "a", [*rows("a", 6), Example("a", (4, 5, 6), (4, 5, 6), breaks=(2,)), Example("a", (1, 2, 3), None, 1)], 0
    )
    again = ReservoirMemory(8)
    again.load_state(*through_json(memory.state()))
    assert again.rows == memory.rows
    more = rows("b", 20, 3)
    memory.add_task("b", more, 0)
    again.add_task("b", more, 0)
    assert again.rows == memory.rows
    assert again.draw(3, [5, 1]) == memory.draw(3, [5, 1])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_replay_mixes_in_its_share_of_earlier_tasks_only(share):
    strategy = make_strategy("replay", share=share, memory=50)
    old, new = rows("old", 40), rows("new", 400, 1)
    strategy.before_task(None, context("old", 1, old))
    assert strategy.batch(old[:8]) == old[:8]
    strategy.after_task(None, context("old", 1, old))
    assert strategy.held_heads() == ("old",)
    strategy.before_task(None, context("new", 2, new))
    batches = [strategy.batch(new[i : i + 8]) for i in range(0, 400, 8)]
    replayed = [row for batch in batches for row in batch if row.replayed]
    assert all(row.task == "old" for row in replayed)
    assert len(replayed) == pytest.approx(share * (400 + len(replayed)), abs=1)
    assert all(len({row.input_ids for row in batch}) == len(batch) for batch in batches)


def test_rehearsal_adds_what_the_base_has_written_once_and_earlier_tasks(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("rehearsal", share=0.25, base_share=0.25, base_rows=8, base_length=6)
    old, new = rows("old", 40), rows("new", 40, 1)
    strategy.before_task(wrapped, context("old", 1, old))
    written = {row.input_ids for row in strategy.written.rows}
    assert written == set(write_(wrapped, 8, 6))
    first = [row for i in range(0, 40, 8) for row in strategy.batch(old[i : i + 8])]
    assert {row.task for row in first if row.replayed} == {"base"}
    strategy.after_task(wrapped, context("old", 1, old))
    write(adapter_parameters(wrapped), {n: p + 1 for n, p in read(adapter_parameters(wrapped)).items()})
    strategy.before_task(wrapped, context("new", 2, new))
    assert {row.input_ids for row in strategy.written.rows} == written, "the trained model writes nothing"
    second = Counter(row.task for i in range(0, 40, 8) for row in strategy.batch(new[i : i + 8]))
    assert second == {"new": 40, "old": 20, "base": 20}
    assert strategy.held_heads() == ("old",), "the base has no head"


def test_distillation_adds_the_divergence_from_the_base_on_what_it_has_written(model):
    wrapped = adapted(model, "curlora")
    strategy = make_strategy("rehearsal", share=0.0, base_share=0.5, base_rows=8, base_length=6, distill=3.0)
    strategy.before_task(wrapped, context("new", 1, rows("new", 12)))
    batch = strategy.batch(rows("new", 4))
    written = [row for row in batch if row.task == "base"]
    assert len(written) == 4

    def added() -> float:
        losses, hidden, mask, logits = forward(wrapped, batch)
        output = StepOutput(losses.mean(), hidden, mask, weight=0.5, ranks=2, logits=logits)
        return float((strategy.loss(wrapped, batch, output) - output.loss).detach())

    assert added() == pytest.approx(0, abs=1e-6), "an untrained adapter is the base"
    before = forward(wrapped, written)[3]([0, 1, 2, 3], 5).softmax(-1)
    start = read(adapter_parameters(wrapped))
    write(adapter_parameters(wrapped), {n: p + 0.1 * torch.randn(p.shape) for n, p in start.items()})
    after = forward(wrapped, written)[3]([0, 1, 2, 3], 5).softmax(-1)
    divergence = (before * (before / after).log()).sum(-1).mean(1).sum() / len(batch)
    assert added() == pytest.approx(float(3.0 * 0.5 * 2 * divergence), rel=1e-4)
    assert divergence > 1e-4
    kept = read(adapter_parameters(wrapped))
    assert not any(torch.equal(kept[name], start[name]) for name in start), "the trained weights are back"
