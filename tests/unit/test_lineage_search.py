"""Searches in a real MLflow store: trials are grandchildren, a step says what it was trained under and why."""

from dataclasses import replace

import pytest
from sample_run import START, make_run

from pipelines.lineage.projection import project
from pipelines.runs.results import SearchSummary
from tests.unit.sample_records import step_record, training

FOLDER = "search/1-mrpc-0a1b2c3d"


def trial(number: int, status: str, **fields) -> dict:
    worth = {"objective": 0.5 + number / 10, "learning": 0.6 + number / 10, "retention_loss": 0.1}
    rung = {"rung": 1 / 3, "step": 3, "steps": 9, "time": START + 4 * number, **worth}
    setting = {"adapter": {"r": 8}, "strategy": {"name": "sequential"}, "training": {"learning_rate": 1e-3 * number}}
    return {
        "number": number,
        "values": {"training.learning_rate": 1e-3 * number},
        "status": status,
        "setting": setting,
        "rungs": [rung],
        "scores": {"mrpc": 0.6},
        "steps": 9 if status == "finished" else 3,
        "total_steps": 9,
        "fingerprint": f"{number}" * 32,
        "directory": f"steps/1-mrpc-{str(number) * 8}",
        "error": None,
        "seconds": {"total": 4.0, "train": 2.0},
        "started": START + 4 * number - 3,
        "finished": START + 4 * number,
        **worth,
        **fields,
    }


def write_search(run, records: dict[str, dict], chosen: str | None) -> None:
    for name, record in records.items():
        run.write_json(f"{FOLDER}/trials/{name}/trial.json", record)
    curve = [[step, 1.0 / step, 1e-3, START + step] for step in range(1, 10)]
    step = step_record(tasks=("mrpc",), training=training(9, curve=curve))
    run.write_json(f"{FOLDER}/trials/a/steps/1-mrpc-11111111/metrics.json", step)
    run.write_json(f"{FOLDER}/trials/b/train/22222222/00000003.json", {"curve": curve[:3]})
    if chosen is None:
        return
    run.write_json(
        f"{FOLDER}/results.json",
        {
            "task": "mrpc",
            "position": 1,
            "why": "training.learning_rate=0.001: highest objective",
            "rule": "highest objective wins",
            "chosen": records[chosen],
            "trials": list(records.values()),
            "steps": {"spent": 15, "whole": 27},
            "search": {"trials": 3, "algorithm": "random"},
        },
    )
    run.write_bytes(f"{FOLDER}/table.md", b"| trial |")
    entry = SearchSummary(
        task="mrpc",
        position=1,
        why="highest",
        rule="highest objective wins",
        pareto=[],
        steps={"spent": 15, "whole": 27},
        values=records[chosen]["values"],
        directory=FOLDER,
        trials=3,
        adopted=False,
        until=2,
    )
    run.write_json("results.json", replace(run.results(), searches=(entry,)))


def kinds(client, experiment: str) -> dict[str, list]:
    found = client.get_experiment_by_name(experiment)
    runs: dict[str, list] = {}
    for run in client.search_runs([found.experiment_id]):
        runs.setdefault(run.data.tags["curlora.kind"], []).append(run)
    return runs


def test_trials_are_grandchildren_with_curves_scores_and_what_became_of_them(store, tmp_path):
    from mlflow import MlflowClient

    client, run = MlflowClient(tracking_uri=store), make_run(tmp_path)
    records = {
        "a": trial(1, "finished"),
        "b": trial(2, "pruned"),
        "c": trial(3, "failed", error="the loss is not finite", rungs=[], scores={}, seconds=None, started=None),
    }
    write_search(run, records, None)
    project(run, store, "searched")  # while it goes on
    assert len(kinds(client, "searched")["trial"]) == 3
    write_search(run, records, "a")
    project(run, store, "searched")
    once = kinds(client, "searched")
    project(run, store, "searched")
    assert {k: len(v) for k, v in kinds(client, "searched").items()} == {k: len(v) for k, v in once.items()}
    (chain,), (search,) = once["chain"], once["search"]
    assert search.data.tags["mlflow.parentRunId"] == chain.info.run_id
    assert search.data.tags["curlora.chosen"] == "training.learning_rate=0.001"
    trials = {t.data.tags["curlora.trial"]: t for t in once["trial"]}
    assert {t.data.tags["mlflow.parentRunId"] for t in trials.values()} == {search.info.run_id}
    assert trials["a"].data.params["training.learning_rate"] == "0.001"
    assert (trials["a"].data.tags["curlora.chosen"], trials["b"].data.tags["curlora.chosen"]) == ("true", "false")
    assert trials["c"].info.status == "FAILED"
    assert trials["c"].data.tags["curlora.error"] == "the loss is not finite"
    objective = client.get_metric_history(trials["a"].info.run_id, "objective")
    assert sorted((m.step, m.value) for m in objective) == [(3, pytest.approx(0.6)), (9, pytest.approx(0.6))]
    assert len(client.get_metric_history(trials["a"].info.run_id, "train/loss")) == 9
    assert len(client.get_metric_history(trials["b"].info.run_id, "train/loss")) == 3  # from its last checkpoint


def test_steps_say_what_they_were_trained_under_and_why(store, tmp_path):
    from mlflow import MlflowClient

    client, run = MlflowClient(tracking_uri=store), make_run(tmp_path)
    write_search(run, {"a": trial(1, "finished"), "b": trial(2, "pruned")}, "a")
    ids = project(run, store, "why")
    steps = {step.data.tags["curlora.position"]: step for step in kinds(client, "why")["step"]}
    assert set(steps) == {"1", "2", "3"}
    for position in ("1", "2"):
        assert steps[position].data.tags["curlora.why"] == "highest"
        assert steps[position].data.tags["curlora.search"] == FOLDER
    assert "curlora.why" not in steps["3"].data.tags
    assert steps["1"].info.run_id in ids.values()
