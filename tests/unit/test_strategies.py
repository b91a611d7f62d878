"""What every strategy promises, on a small model in a plain training loop."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategy_cases import adapted, context, forward, rows, through_json, train

import curlora.continual
from curlora.continual import (
    STRATEGIES,
    StepOutput,
    Strategy,
    describe_options,
    make_strategy,
    option,
    option_defaults,
    options_table,
)
from curlora.continual.parameters import adapter_parameters, read, write

OFF = {
    "replay": {"share": 0.0},
    "rehearsal": {"share": 0.0, "base_share": 0.0},
    "ilora": {"share": 0.0, "consistency": 0.0, "decay": 0.0},
    "coma": {"weight": 1.0},
    "lwf": {"weight": 0.0},
    "clora": {"strength": 0.0, "k": 4},
    "ewc": {"strength": 0.0},
    "curvature": {"strength": 0.0, "base_strength": 0.0},
    "olora": {"strength": 0.0},
}

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(OFF))
def test_without_weight_a_strategy_is_sequential_to_the_bit(model, name):
    wrapped, results = adapted(model, "curlora" if name == "curvature" else "lora"), []
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
        ("ilora", {"turnover": 3.0}),
        ("ewc", {"strength": 1e4, "examples": 6}),
        ("ewc", {"strength": 1.0, "summed": True, "base_strength": 1.0, "base_rows": 5, "base_length": 6}),
        ("curvature", {"examples": 6, "base_rows": 5, "base_length": 6, "share": 0.2}),
        ("curvature", {"examples": 6, "base_rows": 5, "base_length": 6, "pool": True}),
        ("clora", {"k": 4}),
    ],
)
def test_an_interrupted_task_goes_on_with_the_same_bits(model, name, options, kind):
    if name == "clora" and kind == "curlora":
        pytest.skip("clora needs LoRA's factors")
    if name == "curvature" and kind == "lora":
        pytest.skip("curvature needs frozen factors")
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


def test_strategies_import_neither_ray_nor_pipelines():
    allowed = {"curlora", "torch", "numpy", "peft", "transformers", *sys.stdlib_module_names}
    for file in Path(curlora.continual.__file__).parent.rglob("*.py"):
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
        ("rehearsal", {"lwf": -1}, "lwf is -1; use a number of at least 0, e.g. 0.0"),
        ("rehearsal", {"size": 3}, "does not take size"),
        ("rehearsal", {"share": 0.6, "base_share": 0.6}, "1.2 together; use less than 1"),
        ("clora", {"k": "many"}, "k is 'many'; use a whole number of at least 1, e.g. 128"),
        ("clora", {"k": 4.0}, "k is 4.0; use a whole number"),
        ("ewc", {"strength": True}, "strength is True; use a number of at least 0"),
        ("ewc", {"decay": float("nan")}, r"decay is nan; use a number in \[0, 1\]"),
        ("ewc", {"strength": -1}, "strength is -1"),
        ("curvature", {"pool": 1}, "pool is 1; use true or false, e.g. False"),
        ("curvature", {"size": 3}, "does not take size"),
    ],
)
def test_impossible_options_are_refused_with_the_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_strategy(name, **options)


def test_options_have_defaults_that_work():
    for name in STRATEGIES:
        assert make_strategy(name, **option_defaults(name)).name == name
        assert make_strategy(name, **dict.fromkeys(option_defaults(name))).name == name, "null means the default"


def test_a_strategy_inherits_options_and_changes_their_defaults():
    described = {option.name: option for option in describe_options("coma")}
    assert list(described)[:3] == ["weight", "share", "base_share"], "its own come first"
    assert (described["share"].default, described["share"].declared_by) == (0.0, "coma")
    assert (described["base_rows"].declared_by, described["memory"].declared_by) == ("rehearsal", "replay")
    assert "size" not in described, "rehearsal has no such option"
    assert option_defaults("ilora")["share"] == 0.5 != option_defaults("replay")["share"]


def test_every_option_says_what_it_means():
    for name in STRATEGIES:
        for described in describe_options(name):
            assert described.description and len(described.description) < 110, f"{name}.{described.name}"


def test_the_readme_lists_the_options_as_the_code_declares_them():
    readme = (Path(__file__).resolve().parents[2] / "curlora" / "README.md").read_text(encoding="utf-8")
    assert options_table() in readme, "run: python -c 'from curlora.continual import *; print(options_table())'"


def test_an_option_of_an_unknown_type_is_refused_where_it_is_declared():
    with pytest.raises(TypeError, match=r"Wrong\.names is annotated as list"):

        class Wrong(Strategy):
            names: list[str] = option([], "names")


def test_a_file_is_all_that_a_new_strategy_needs(tmp_path):
    shutil.copytree(Path(curlora.__file__).parent, tmp_path / "curlora")
    (tmp_path / "curlora" / "continual" / "strategies" / "foo.py").write_text(
        "from curlora.continual import Strategy, option\n"
        "class Foo(Strategy):\n"
        "    name = 'foo'\n"
        "    strength: float = option(2.0, 'how much', at_least=0)\n"
    )
    code = (
        "import sys\n"
        "from pipelines.config.names import STRATEGIES as NAMES\n"
        "assert 'foo' in NAMES\n"
        "assert not {'curlora', 'torch', 'peft'} & set(sys.modules), 'the name is known without them'\n"
        "from curlora.continual import STRATEGIES, make_strategy, options_table\n"
        "assert make_strategy('foo', strength=3).strength == 3 and 'foo' in STRATEGIES\n"
        "assert '| `foo` | `strength` | float | 2.0 | ≥ 0 | how much |' in options_table()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


@pytest.mark.parametrize("name", ["ilora", "lwf", "ewc", "curvature", "clora", "olora"])
def test_without_an_adapter_there_is_nothing_to_protect(model, name):
    with pytest.raises(ValueError, match=r"adapter|LoRA"):
        make_strategy(name).check(model)
