"""What each strategy promises, on a small model in a plain training loop: torch and PEFT, no Ray, no pipelines."""

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

import curlora.continual
from curlora import CurloraConfig
from curlora.continual import STRATEGIES, Example, StepOutput, TaskContext, make_strategy, option_defaults
from curlora.continual.clora import subspace
from curlora.continual.ewc import fisher_information
from curlora.continual.memory import ReservoirMemory
from curlora.continual.parameters import adapter_parameters, read, swapped, write
from curlora.continual.passes import hidden_with

CONFIGS = {
    "curlora": lambda: CurloraConfig(r=4, task_type="CAUSAL_LM"),
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
}
OFF = {
    "replay": {"share": 0.0},
    "rehearsal": {"share": 0.0, "base_share": 0.0},
    "ilora": {"share": 0.0, "consistency": 0.0, "decay": 0.0},
    "coma": {"weight": 1.0},
    "lwf": {"weight": 0.0},
    "clora": {"strength": 0.0, "k": 4},
    "ewc": {"strength": 0.0},
    "olora": {"strength": 0.0},
}


def rows(task: str, count: int, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    tokens = [tuple(generator.integers(3, 40, size=int(n)).tolist()) for n in generator.integers(4, 9, size=count)]
    return [Example(task, row, row) for row in tokens]


def adapted(model, kind: str):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, CONFIGS[kind]())
    for index, parameter in enumerate(adapter_parameters(wrapped).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.add_(noise, alpha=0.05)
    return wrapped


def forward(model, examples):
    ids = torch.zeros(len(examples), max(len(e.input_ids) for e in examples), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        mask[row, : len(example.input_ids)] = 1
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    targets = torch.where(mask.bool(), ids, -100)[:, 1:]
    losses = cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)
    return (
        losses / mask[:, 1:].sum(1),
        output.hidden_states[-1],
        mask,
        lambda rows, length: output.logits[rows, :length],
    )


def context(name: str, position: int, examples) -> TaskContext:
    return TaskContext(
        name, position, 0, examples, losses=lambda model, chosen: forward(model, chosen)[0], write=write_
    )


def write_(model, count: int, length: int) -> list[tuple[int, ...]]:
    """What a model writes by itself, in a small way: its likeliest tokens after each of the first ones."""
    tokens = torch.arange(3, 3 + count)[:, None]
    with torch.no_grad():
        while tokens.shape[1] < length:
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    return [tuple(row) for row in tokens.tolist()]


def train(model, strategy, task: TaskContext, steps: int = 6, on_step=lambda step: None) -> None:
    """A plain loop, the hooks in their order."""
    strategy.before_task(model, task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        first = (step - 1) * 4 % len(task.examples)
        batch = strategy.batch(list(task.examples[first : first + 4]))
        losses, hidden, mask, logits = forward(model, batch)
        replayed = sum(e.replayed for e in batch)
        output = StepOutput(losses.mean(), hidden, mask, replayed=replayed, logits=logits)
        strategy.loss(model, batch, output).backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.after_step(model, step)
        on_step(step)
    strategy.after_task(model, task)


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", sorted(OFF))
def test_without_weight_a_strategy_is_sequential_to_the_bit(model, name):
    wrapped, results = adapted(model, "lora"), []
    start = read(adapter_parameters(wrapped))
    for strategy in (make_strategy("sequential"), make_strategy(name, **OFF[name])):
        write(adapter_parameters(wrapped), start)
        for position, task in enumerate(("first", "second"), 1):
            train(wrapped, strategy, context(task, position, rows(task, 12, position)))
        results.append(strategy.evaluation_weights(wrapped) or read(adapter_parameters(wrapped)))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("kind", ["curlora", "lora"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("replay", {"share": 0.3}),
        ("rehearsal", {"share": 0.2, "base_share": 0.3, "base_rows": 9, "base_length": 6, "distill": 2.0}),
        ("ilora", {}),
        ("coma", {"share": 0.2}),
        ("ewc", {"strength": 1e4, "examples": 6}),
        ("clora", {"k": 4}),
    ],
)
def test_an_interrupted_task_goes_on_with_the_same_bits(model, name, options, kind):
    if name == "clora" and kind == "curlora":
        pytest.skip("clora needs LoRA's factors")
    wrapped = adapted(model, kind)
    tasks = [context("first", 1, rows("first", 12, 1)), context("second", 2, rows("second", 12, 2))]
    strategy = make_strategy(name, **options)
    train(wrapped, strategy, tasks[0])
    between, weights = through_json(strategy.state()), read(adapter_parameters(wrapped))
    stopped = {}

    def after(model, strategy):
        strategy.before_task(model, tasks[1])
        optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)

        def step(number):
            batch = strategy.batch(list(tasks[1].examples[:4]))
            losses, hidden, mask, logits = forward(model, batch)
            count = sum(e.replayed for e in batch)
            output = StepOutput(losses.mean(), hidden, mask, replayed=count, logits=logits)
            loss = strategy.loss(model, batch, output)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step(model, number)

        return step

    whole = make_strategy(name, **options)
    whole.load_state(*between)
    step = after(wrapped, whole)
    for number in range(1, 5):
        step(number)
        if number == 2:
            stopped = {"state": through_json(whole.state()), "weights": read(adapter_parameters(wrapped))}
    wanted, published = read(adapter_parameters(wrapped)), whole.evaluation_weights(wrapped)

    write(adapter_parameters(wrapped), weights)
    resumed = make_strategy(name, **options)
    resumed.load_state(*between)
    step = after(wrapped, resumed)
    resumed.load_state(*stopped["state"])
    write(adapter_parameters(wrapped), stopped["weights"])
    for number in (3, 4):
        step(number)
    found = read(adapter_parameters(wrapped))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    if published is not None:
        again = resumed.evaluation_weights(wrapped)
        assert all(torch.equal(again[key], published[key]) for key in published)


def through_json(state: tuple[dict, dict]) -> tuple[dict, dict]:
    tensors, values = state
    return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(values))


def test_strategies_import_neither_ray_nor_pipelines():
    allowed = {"curlora", "torch", "numpy", "peft", "transformers", *sys.stdlib_module_names}
    for file in Path(curlora.continual.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module.split(".")[0] for module in modules} <= allowed, file.name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("replay", {"shar": 0.1}, "does not take shar; did you mean 'share'"),
        ("replay", {"share": 0.1, "size": 2}, "not both"),
        ("replay", {"share": 1.5}, r"share is 1.5; use a number in \[0, 1\)"),
        ("ilora", {"decay": 1.0}, "decay is 1.0"),
        ("coma", {"weight": 0.0}, r"weight is 0.0; use a number in \(0, 1\]"),
        ("lwf", {"temperature": 0}, "temperature is 0; use a number above 0"),
        ("rehearsal", {"lwf": -1}, "lwf is -1; use 0 or more"),
        ("clora", {"k": "many"}, "wrong type"),
        ("ewc", {"strength": -1}, "strength is -1"),
    ],
)
def test_impossible_options_are_refused_with_the_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, **options)


def test_options_have_defaults_that_work():
    for name in STRATEGIES:
        assert make_strategy(name, **option_defaults(name)).name == name


@pytest.mark.parametrize("name", ["ilora", "lwf", "ewc", "clora", "olora"])
def test_without_an_adapter_there_is_nothing_to_protect(model, name):
    with pytest.raises(ValueError, match=r"adapter|LoRA"):
        make_strategy(name).check(model)


# ------------------------------------------------------------------------------------------------------------ memory


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


# ---------------------------------------------------------------------------------------------------------------- LwF


@pytest.fixture
def head():
    """The head of an earlier task: what it says of the last real token."""
    layer = torch.nn.Linear(16, 3)
    torch.nn.init.normal_(layer.weight, std=3.0, generator=torch.Generator().manual_seed(0))

    def scores(hidden, mask):
        return {"old": layer(hidden[torch.arange(len(hidden)), mask.sum(1) - 1])}

    return scores


def classes(task: str, count: int, seed: int = 0) -> list[Example]:
    return [Example(task, row.input_ids, target=0) for row in rows(task, count, seed)]


def moved_on(wrapped, strategy, name: str = "new"):
    """The strategy in the middle of a second task, the adapter away from where it began; and where it began."""
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
    alone.tasks, alone.before = ("old",), strategy.lwf.before
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
    assert again.lwf.tasks == ("old",)
    assert all(torch.equal(again.lwf.before[n], t) for n, t in strategy.lwf.before.items())


# ------------------------------------------------------------------------------------------------------------- I-LoRA


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


def test_consistency_is_the_masked_error_against_the_slow_copy(model):
    wrapped = adapted(model, "lora")
    strategy = make_strategy("ilora", consistency=2.0)
    old = rows("old", 8)
    strategy.before_task(wrapped, context("old", 1, old))
    strategy.after_task(wrapped, context("old", 1, old))
    strategy.slow = {name: 0.5 * value for name, value in strategy.slow.items()}
    batch = rows("new", 2, 5) + strategy.memory.draw(3, [0])
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


# --------------------------------------------------------------------------------------------------------------- CoMA


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
    assert len(strategy.memory) == 0
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


# ---------------------------------------------------------------------------------------------------------------- EWC


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


# ------------------------------------------------------------------------------------------------------ CLoRA, O-LoRA


def minimise(model, strategy, steps=200):
    optimizer = torch.optim.Adam(adapter_parameters(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = strategy.penalty(model)
        penalty.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
    return strategy.penalty(model).item()


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
