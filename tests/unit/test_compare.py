"""Comparing methods: configurations, intervals and tables as pure functions."""

import csv
import io
import math

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from pipelines.cli.app import main
from pipelines.comparison.compare import tuning_config
from pipelines.comparison.figures import examples_figure, pareto_front, tradeoff_figure
from pipelines.comparison.fronts import forgetting_at, fronts
from pipelines.comparison.intervals import paired_intervals
from pipelines.comparison.methods import Comparison, merged, read_methods
from pipelines.comparison.tables import as_csv, markdown
from pipelines.errors import ConfigError
from pipelines.metrics.paired import bootstrap, mean_and_error
from pipelines.runs.directory import RunDirectory
from pipelines.runs.results import StepSummary
from tests.conftest import minimal
from tests.unit.sample_records import results

RAW = {
    "name": "sequence",
    "storage": "/s",
    "adapter": {"type": "curlora", "r": 32, "whiten": True},
    "training": {"max_steps": 5},
    "tasks": [],
}


def test_another_adapter_type_starts_from_nothing_and_the_same_type_is_refined():
    assert merged(RAW, {"adapter": {"type": "lora", "r": 8}})["adapter"] == {"type": "lora", "r": 8}
    assert merged(RAW, {"adapter": {"r": 8}})["adapter"] == {"type": "curlora", "r": 8, "whiten": True}
    assert RAW["adapter"]["r"] == 32


def test_a_method_is_an_adapter_with_a_strategy():
    method, plain = read_methods(["lora+olora", "curlora"])
    comparison = Comparison(RAW | {"strategy": {"name": "rehearsal", "share": 0.2}}, [method, plain], [0])
    raw = comparison.configuration(method, seed=3, learning_rate=1e-3)
    assert raw["adapter"]["type"] == "lora"
    assert raw["adapter"]["carry"] == "stack"
    assert raw["strategy"]["name"] == "olora"
    assert raw["training"] == {"max_steps": 5, "seed": 3, "learning_rate": 1e-3}
    assert raw["storage"] == "/s/compare-sequence"
    assert comparison.configuration(plain)["strategy"] == {"name": "sequential"}  # not the sequence's own


def test_a_pattern_is_a_product_of_adapters_and_strategies():
    names = [method.name for method in read_methods(["lora/curlora+ewc/replay", "none", "lora+ewc"])]
    assert names == ["lora+ewc", "lora+replay", "curlora+ewc", "curlora+replay", "none"]


def test_a_method_on_so_many_examples_is_a_method_of_its_own(tmp_path):
    (lora,) = read_methods(["lora+ewc"])
    method = lora.on(100)
    assert (method.name, method.safe_name) == ("lora+ewc@100", "lora_ewc-n100")
    comparison = Comparison(RAW, [method], [0])
    assert comparison.configuration(method)["training"] == {"max_steps": 5, "max_train_examples": 100}


def test_methods_that_train_the_first_task_alike_share_the_trials_of_their_learning_rate(tmp_path):
    methods = read_methods(["lora", "lora+replay", "lora+ewc", "lora+olora", "lora+ilora", "lora+rehearsal"])
    comparison = Comparison(minimal(tmp_path, tmp_path), methods, [0], [1e-3])
    plain, *others = [tuning_config(comparison, m, 1e-3).model_dump(exclude={"name"}) for m in methods]
    assert [other == plain for other in others] == [True, True, True, False, False]


def test_unknown_methods_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'lora'") as error:
        read_methods(["lorra", "curlora+replya", "lora"])
    assert len(error.value.problems) == 2


def test_shipped_methods_are_valid_configurations(tmp_path):
    from pipelines.comparison.methods import CATALOGUE
    from pipelines.config.loading import parse_config, read_yaml

    for name in read_yaml(CATALOGUE)["adapters"]:
        (method,) = read_methods([name])
        parse_config(Comparison(minimal(tmp_path, tmp_path), [method], [0]).configuration(method))
    for name in read_yaml(CATALOGUE)["strategies"]:
        (method,) = read_methods([f"lora+{name}"])
        parse_config(Comparison(minimal(tmp_path, tmp_path), [method], [0]).configuration(method))


def test_standard_error_is_that_of_the_mean():
    assert mean_and_error([1.0, 3.0]) == [2.0, 1.0]
    assert mean_and_error([5.0]) == [5.0, None]
    assert mean_and_error([]) == [None, None]


def test_bootstrap_covers_the_truth_about_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        parts = [(generator.normal(0.3, 1.0, 80), np.ones(80)) for _ in range(3)]
        interval = bootstrap(parts, seed=trial)
        hits += interval["low"] <= 0.3 <= interval["high"]
    assert 88 <= hits <= 100


def test_interval_of_many_examples_is_that_of_the_normal_distribution():
    generator = np.random.default_rng(0)
    parts = [(generator.normal(0.3, 1.0, 2000), np.ones(2000)) for _ in range(3)]
    error = math.sqrt(sum(values.var(ddof=1) / len(values) for values, _ in parts)) / 3
    interval = bootstrap(parts)
    assert interval["low"] == pytest.approx(interval["mean"] - 1.96 * error, abs=0.2 * error)
    assert interval["high"] == pytest.approx(interval["mean"] + 1.96 * error, abs=0.2 * error)


def test_bootstrap_weighs_examples_and_counts_tasks_alike():
    parts = [(np.array([0.0, 1.0]), np.array([3.0, 1.0])), (np.array([1.0]), np.array([50.0]))]
    assert bootstrap(parts)["mean"] == pytest.approx((0.25 + 1.0) / 2)
    assert bootstrap([]) is None


def run_with(folder, correct: list[int], step: str = "task") -> RunDirectory:
    """A run of one task, in one step, whose test examples came out as `correct` says."""
    run = RunDirectory(str(folder))
    run.write_json("results.json", results(tasks=("task",), steps=(StepSummary(step, "f", "steps/1"),)))
    run.write_bytes("steps/1/predictions/task.jsonl", "".join(f'{{"correct": {c}}}\n' for c in correct).encode())
    return run


def test_pairs_are_of_one_seed_also_where_a_run_is_missing(tmp_path):
    reference = {0: run_with(tmp_path / "r0", [1, 1, 1, 1]), 1: run_with(tmp_path / "r1", [0, 1, 0, 1])}
    ours = {1: run_with(tmp_path / "o1", [0, 1, 0, 1])}  # its run with seed 0 failed
    assert paired_intervals(ours, reference)["learning"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert paired_intervals(ours, {0: reference[0]}) is None


def test_joint_training_has_no_difference_right_after_a_task(tmp_path):
    sequential = {0: run_with(tmp_path / "sequential", [0, 1])}
    joint = {0: run_with(tmp_path / "joint", [1, 1], step="joint")}
    assert paired_intervals(joint, sequential) == {"learning": None, "forgetting": None}


def result() -> dict:
    figures = {
        key: [None, None]
        for key in (
            *("learning_accuracy", "average_accuracy", "backward_transfer", "forgetting", "forward_transfer"),
            *("nll_learning", "nll_backward_transfer", "nll_average", "perplexity_ratio", "trainable_parameters"),
            *("adapter_bytes", "kept_bytes", "train_seconds", "tokens_per_second", "peak_memory_bytes"),
        )
    }
    interval = {"mean": -0.1, "low": -0.2, "high": -0.05}
    methods = {
        "lora": {"runs": 3, "learning_rate": 1e-3, **figures, "nll_learning": [0.5, 0.01]},
        "curlora": {
            "runs": 3,
            "learning_rate": None,
            **figures,
            "nll_learning": [0.4, 0.02],
            "against_reference": {"learning": interval, "forgetting": None},
        },
    }
    return {"name": "c", "seeds": [0], "reference": "lora", "methods": methods}


def test_table_shows_what_there_is_and_dashes_for_the_rest():
    text = markdown(result())
    assert "| lora | 0.001 | 3 | 0.500 ± 0.010 |" in text
    assert "| curlora | config | 3 | 0.400 ± 0.020 |" in text
    assert "| curlora | -0.100 [-0.200, -0.050] | – |" in text
    assert "ppl" not in text


@pytest.mark.parametrize("draw", [tradeoff_figure, examples_figure])
def test_figures_are_drawn_with_and_without_anything_to_show(draw):
    shown, names = result(), ["lora@100", "lora@500"]
    found = [summary | {"nll_backward_transfer": [-0.1, 0.01]} for summary in shown["methods"].values()]
    shown["methods"] = dict(zip(names, found, strict=True))
    nothing = shown | {"methods": {}}
    shown["methods"]["lora@600"] = shown["methods"]["lora@500"]  # two names at one place
    full, empty = draw(shown), draw(nothing)
    assert full.startswith(b"\x89PNG")
    assert len(full) > len(empty) > 1000


def test_the_front_is_what_no_other_method_beats_in_learning_and_in_forgetting():
    front = [(0.1, -0.2), (0.5, 0.1), (0.9, 0.8)]
    beaten = [(0.4, 0.2), (0.9, 0.9), (0.1, 0.0)]
    assert pareto_front(beaten + front) == front
    assert pareto_front([]) == []


def test_forgetting_is_read_off_where_a_method_learns_as_much():
    points = [(0.2, 0.1), (0.6, 0.3), (0.5, 0.9), (1.0, 0.7)]  # the third one is beaten
    assert forgetting_at(points, 0.6) == pytest.approx(0.3)
    assert forgetting_at(points, 0.8) == pytest.approx(0.5)
    assert forgetting_at(points, 0.1) == 0.1  # its gentlest point learns more and forgets that
    assert forgetting_at(points, 1.01) is None
    assert forgetting_at([], 0.1) is None


def test_fronts_compare_methods_at_the_learning_of_the_reference():
    def text(learning, backward):
        return results(tasks=("t",), nll_learning=learning, nll_backward_transfer=backward, learning_accuracy=None)

    outcomes = {
        "lora:0.001": {0: text(0.5, -0.2), 1: text(0.7, -0.4)},
        "lora:0.01": {0: text(1.0, -1.2), 1: text(1.0, -1.4)},
        "curlora:0.01": {0: text(0.97, -0.1), 1: text(0.9, -0.1)},
        "none": {0: text(0.0, 0.0)},  # no rate, no front
    }
    found = fronts(outcomes, "lora")
    assert found["learning"] == pytest.approx(0.95)
    assert set(found["methods"]) == {"lora", "curlora"}
    lora, curlora = found["methods"]["lora"], found["methods"]["curlora"]
    expected = [0.2 + (0.95 - 0.5) / 0.5 * 1.0, 0.4 + (0.95 - 0.7) / 0.3 * 1.0]
    assert lora["forgetting"] == pytest.approx(mean_and_error(expected)) and lora["seeds"] == 2
    assert curlora["forgetting"] == [pytest.approx(0.1), None] and curlora["seeds"] == 1
    table = markdown(result() | {"fronts": found})
    assert "At a learning of 0.950, 95 % of the best of lora" in table
    assert "| curlora | 0.935 ± 0.035 | 0.100 | 1 |" in table
    assert fronts({"lora": outcomes["none"]}, "lora") is None


def test_a_method_at_each_rate_is_a_method_that_is_not_tuned(tmp_path):
    (lora,) = read_methods(["lora-all-decay"])
    slow, fast = lora.at([1e-3, 4e-3])
    assert (fast.name, fast.safe_name, fast.tuned) == ("lora-all-decay:0.004", "lora-all-decay-lr0_004", False)
    assert slow.changes["training"] == {"weight_decay": 0.1, "learning_rate": 1e-3}
    (none,) = read_methods(["none"])
    assert none.at([1e-3, 4e-3]) == [none]


def test_csv_has_a_column_for_each_error():
    rows = list(csv.DictReader(io.StringIO(as_csv(result()))))
    assert rows[0]["nll_learning_se"] == "0.01"
    assert [row["method"] for row in rows] == ["lora", "curlora"]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (["--learning-rates", "1e-3"], "add --learning-rates with at least two"),
        (["--learning-rates", "1e-3,4e-3", "--train-examples", "10"], "leave out --train-examples"),
    ],
)
def test_fronts_need_several_learning_rates_and_nothing_else(tmp_path, given, remedy):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(minimal(tmp_path, tmp_path)))
    outcome = CliRunner().invoke(main, ["compare", str(tmp_path / "c.yaml"), "--methods", "lora", "--fronts", *given])
    assert outcome.exit_code == 2 and remedy in outcome.output
