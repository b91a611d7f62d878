"""Methods side by side on a real chain: runs at the same time, learning rates from a grid, nothing trained twice."""

import json

import pytest

from tests.bench import SHARE

METHODS = "curlora-r16,none"


def compare(bench, config) -> dict:
    bench.warm.connect()
    options = ["--learning-rates", "1e-3,3e-2", "--reference", "none", "--parallel", "2", "--json"]
    return json.loads(bench.command("compare", str(config), "--methods", METHODS, *options))


@pytest.fixture(scope="module")
def config(bench):
    tasks = [bench.raw["tasks"][0], bench.raw["tasks"][2]]
    training = bench.raw["training"] | {"max_steps": 12}
    return bench.config("side", tasks=tasks, training=training, resources={"workers": 1, "cpus_per_worker": SHARE})


@pytest.fixture(scope="module")
def found(bench, config) -> dict:
    return compare(bench, config)


def test_each_tuned_method_has_the_best_rate_of_the_grid(bench, found):
    folder = bench.root / "runs" / "compare-side"
    assert found["methods"]["none"]["learning_rate"] is None
    rate = found["methods"]["curlora-r16"]["learning_rate"]
    results = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("tune-curlora-r16-*/results.json")
    }
    assert len(results) == 2
    scores = {name: found["scores"][-1][0] for name, found in results.items()}
    assert scores[f"tune-curlora-r16-{rate:g}".replace(".", "_")] == max(scores.values())


def test_runs_share_the_bases_scores_and_are_held_against_the_reference(bench, found):
    folder = bench.root / "runs" / "compare-side"
    results = {name: json.loads((folder / f"{name}-s0" / "results.json").read_text()) for name in METHODS.split(",")}
    assert results["curlora-r16"]["scores"][0] == results["none"]["scores"][0]
    assert found["methods"]["none"]["trainable_parameters"][0] == 0
    assert found["methods"]["none"]["nll_learning"][0] == pytest.approx(0, abs=1e-6)
    ours, theirs = (results[name]["scores"] for name in METHODS.split(","))
    learned_more = [ours[1][0] - theirs[1][0], theirs[2][1] - ours[2][1]]  # the second task's score is an NLL
    interval = found["methods"]["curlora-r16"]["against_reference"]["learning"]
    assert interval["mean"] == pytest.approx(sum(learned_more) / 2)
    assert interval["low"] < interval["high"]
    for name in ("comparison.md", "comparison.csv", "comparison.json", "tradeoff.png"):
        assert (folder / name).stat().st_size > 0


def test_doing_it_again_trains_nothing(bench, config, found):
    folder = bench.root / "runs" / "compare-side"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/steps/*/metrics.json")}
    assert compare(bench, config) == found
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/steps/*/metrics.json")} == before
