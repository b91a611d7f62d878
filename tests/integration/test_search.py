"""A chain that searches before every task, killed in its first search: trials, warm workers, what the steps become."""

import json
import os
import signal
import sqlite3

import pytest

from tests.bench import wait_for

STEPS = 24
TRIALS = 3
DIVERGING = {"training.learning_rate": 100.0, "training.weight_decay": 100.0}


@pytest.fixture(scope="module")
def changes(bench) -> dict:
    """Two workers a trial: on two cores nothing is left for anything else to reserve."""
    return {
        "training": bench.raw["training"] | {"max_steps": STEPS, "warmup_ratio": 0.0},
        "tracking": {"uri": f"sqlite:///{bench.root}/search.db", "experiment": "search"},
        # the bench's own has a test split only, on which no search may look
        "retention": [{"name": "other", "data": bench.raw["tasks"][2]["data"], "window": 48}],
        "search": {
            "when": "every",
            "space": {
                "training.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True},
                "training.weight_decay": {"low": 0.0, "high": 0.1},
            },
            "start_with": [{"training.learning_rate": 1e-2, "training.weight_decay": 0.0}, DIVERGING],
            "reduction": 2,
            "rungs": 1,
            "trials": TRIALS,
            "objective": {"max_examples": 24, "max_retention_tokens": 500},
        },
    }


def records(bench) -> dict[str, dict]:
    """Trial folder → trial.json, of all searches."""
    found = bench.directory("searched").glob("search/*/trials/*/trial.json")
    return {str(path.parent.relative_to(bench.directory("searched"))): json.loads(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def searched(bench, changes) -> tuple[dict, dict]:
    """(results, trials that had ended when the first driver was killed)."""
    config = bench.config("searched", **changes)
    process = bench.start(config)
    wait_for(lambda: records(bench), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {name: (bench.directory("searched") / name / "trial.json").stat().st_mtime_ns for name in records(bench)}
    return bench.run(config), before


def test_a_chain_searches_before_each_task_on_as_many_cores_as_one_trial_needs(searched, bench):
    results, _ = searched
    assert results["status"] == "finished"
    assert [entry["task"] for entry in results["searches"]] == ["part", "word", "text"]
    assert [entry["trials"] for entry in results["searches"]] == [TRIALS] * 3
    for step, entry in enumerate(results["searches"]):
        setting = bench.metrics(results, step)["setting"]["training"]["learning_rate"]
        assert setting == entry["values"]["training.learning_rate"]
        assert str(f"{setting:g}") in entry["why"]


def test_trials_that_had_ended_before_the_kill_are_not_repeated(searched, bench):
    _, before = searched
    assert before
    for name, written in before.items():
        assert (bench.directory("searched") / name / "trial.json").stat().st_mtime_ns == written


def test_a_trial_that_diverges_is_recorded_and_ends_nothing(searched, bench):
    failed = [r for r in records(bench).values() if r["status"] == "failed"]
    assert [r["values"] for r in failed] == [DIVERGING] * 3
    assert all("not finite" in r["error"] for r in failed)


def test_the_winner_is_taken_over_with_the_bits_of_a_run_configured_by_hand(searched, bench, changes):
    results, _ = searched
    assert all(entry["adopted"] for entry in results["searches"])
    events = [json.loads(path.read_text()) for path in (bench.directory("searched") / "events").glob("*.json")]
    assert sum(event["kind"] == "adopted" for event in events) == 3
    assert not any(event["kind"] == "step_started" for event in events)  # the chain itself trained nothing
    chosen = {name.split(".")[1]: value for name, value in results["searches"][0]["values"].items()}
    plain = {"training": changes["training"] | chosen, "tasks": bench.raw["tasks"][:1]}
    # the search holds a tenth of train back where there is no validation split
    splits = json.loads(json.dumps(bench_splits(bench)))
    plain["tasks"] = [task | {"splits": splits[task["name"]]} for task in plain["tasks"]]
    by_hand = bench.run_warm(bench.config("by-hand", **plain))
    assert bench.metrics(by_hand, 0)["fingerprint"] == bench.metrics(results, 0)["fingerprint"]
    assert bench.adapter_bytes(by_hand, 0) == bench.adapter_bytes(results, 0)


def bench_splits(bench) -> dict[str, dict]:
    import yaml

    config = yaml.safe_load((bench.directory("searched") / "config.yaml").read_text())
    return {task["name"]: task["splits"] for task in config["tasks"]}


def test_lineage_has_every_trial_below_its_search_and_the_reason_on_every_step(searched, bench):
    with sqlite3.connect(bench.root / "search.db") as store:
        tags = dict.fromkeys(row[0] for row in store.execute("select run_uuid from runs"))
        tags = {run: dict(store.execute("select key, value from tags where run_uuid = ?", (run,))) for run in tags}
    kinds = [t["curlora.kind"] for t in tags.values()]
    assert (kinds.count("chain"), kinds.count("step"), kinds.count("search"), kinds.count("trial")) == (1, 3, 3, 9)
    parents = {
        t["curlora.kind"]: {tags[t["mlflow.parentRunId"]]["curlora.kind"]}
        for t in tags.values()
        if "mlflow.parentRunId" in t
    }
    assert parents == {"step": {"chain"}, "search": {"chain"}, "trial": {"search"}}
    assert all("highest objective" in t["curlora.why"] for t in tags.values() if t["curlora.kind"] == "step")
