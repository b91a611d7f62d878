"""The projection into a real MLflow store: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sample_run import START, make_run

from pipelines.errors import LineageError
from pipelines.lineage import store as mlflow_store
from pipelines.lineage.mlflow_records import dataset_source, finite, flatten
from pipelines.lineage.pages import own_address, pages
from pipelines.lineage.projection import Projection, project


@pytest.fixture(scope="module")
def chain(tmp_path_factory, store):
    """A finished chain of three steps and its MLflow runs."""
    run = make_run(tmp_path_factory.mktemp("chain"))
    return run, project(run, store, "chain")


def everything(client, experiment: str) -> dict:
    """All that MLflow holds of an experiment, in a form that compares."""
    found = client.get_experiment_by_name(experiment)
    content = {}
    for item in client.search_runs([found.experiment_id]):
        run = client.get_run(item.info.run_id)
        history = {
            key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        content[run.info.run_id] = {
            "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": run.data.tags,
            "metrics": history,
            "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
            "artifacts": artifacts(client, run.info.run_id),
        }
    return content


def artifacts(client, run_id: str, path: str | None = None) -> list[str]:
    names = []
    for info in client.list_artifacts(run_id, path):
        names += artifacts(client, run_id, info.path) if info.is_dir else [info.path]
    return sorted(names)


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in sorted(client.get_metric_history(run_id, key), key=lambda m: m.step)]


def test_chain_is_parent_and_every_step_a_child_with_original_times(chain, client):
    run, ids = chain
    parent = client.get_run(ids["parent"])
    steps = run.results().steps
    assert set(ids) == {"parent", *(step.fingerprint for step in steps)}
    assert parent.info.status == "FINISHED"
    assert parent.info.start_time == START * 1000
    assert parent.info.end_time == (START + 10 + 300 + 95 + 1) * 1000
    child = client.get_run(ids[steps[1].fingerprint])
    assert child.data.tags["mlflow.parentRunId"] == ids["parent"]
    assert child.data.tags["curlora.parent_fingerprint"] == steps[0].fingerprint
    assert (child.data.tags["curlora.task"], child.data.tags["curlora.position"]) == ("sst2", "2")
    assert (child.info.start_time, child.info.end_time) == ((START + 210) * 1000, (START + 305) * 1000)


def test_parent_draws_scores_over_the_sequence(chain, client):
    run, ids = chain
    parent, results = ids["parent"], run.results()
    for column, task in enumerate(results.tasks):
        measured = [(t, row[column]) for t, row in enumerate(results.scores) if row[column] is not None]
        assert history(client, parent, f"score/{task}") == measured
    assert history(client, parent, "nll/wikitext2") == list(enumerate(results.nll["wikitext2"]))
    assert history(client, parent, "perplexity/wikitext2")[0][1] == pytest.approx(math.exp(4.42))
    assert history(client, parent, "forgetting") == [(3, results.forgetting)]
    assert "nll_backward_transfer" not in client.get_run(parent).data.metrics  # null: one text task has none


def test_child_holds_curve_cost_parameters_datasets_and_adapter(chain, client):
    run, ids = chain
    step = run.metrics(run.finished_steps()[run.results().steps[0].fingerprint])
    run_id = ids[step.fingerprint]
    child = client.get_run(run_id)
    curve = client.get_metric_history(run_id, "train/loss")
    assert {(m.step, m.value, m.timestamp) for m in curve} == {
        (s, loss, round(moment * 1000)) for s, loss, _, moment in step.curve
    }
    assert child.data.metrics["seconds/train"] == 70.0
    assert child.data.metrics["adapter_bytes"] == step.adapter_bytes
    assert child.data.params["training.learning_rate"] == "0.003"
    assert child.data.params["environment.deepspeed_stage"] == "2"
    inputs = {i.dataset.name: i.dataset.digest for i in child.inputs.dataset_inputs}
    assert inputs["mrpc/train"] == step.data["mrpc"].train.digest
    assert inputs["sst2/test"] == next(cell.digest for cell in step.cells if cell.name == "sst2")
    assert {"adapter/adapter_model.safetensors", "heads.safetensors", "metrics.json", "predictions/mrpc.jsonl"} <= set(
        artifacts(client, run_id)
    )


def test_sending_again_changes_nothing(tmp_path, store, client):
    run = make_run(tmp_path)
    run.write_bytes("figures/tasks.png", b"png")
    ids = project(run, store, "again")
    before = everything(client, "again")
    assert before[ids["parent"]]["artifacts"][-2:] == ["figures/tasks.png", "results.json"]
    assert project(run, store, "again") == ids
    assert everything(client, "again") == before


def test_interrupted_sending_is_completed_without_doubles(tmp_path, store, client):
    """As after a server that died: the marks that say `sent` are missing, much of the content is there."""
    run = make_run(tmp_path, tasks=("mrpc", "biomed"))
    ids = project(run, store, "interrupted")
    before = everything(client, "interrupted")
    for run_id in ids.values():
        for mark in ("sent", "sent_base", "last_step"):
            if f"curlora.{mark}" in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, f"curlora.{mark}")
    assert project(run, store, "interrupted") == ids
    assert everything(client, "interrupted") == before


@pytest.mark.parametrize("kept", [False, True])
def test_live_projection_ends_as_one_at_the_end(tmp_path, store, client, kept):
    """Whether every call looks up what is there, or one process remembers what it has sent."""
    names = (f"live-{kept}", f"at-end-{kept}")
    projection = Projection(make_run(tmp_path, finished=0, status=None), store, names[0])
    for done in (0, 1, 2):
        run = make_run(tmp_path, finished=done, status=None)
        ids = projection.send() if kept else project(run, store, names[0])
        assert len(ids) == 1 + done
        assert client.get_run(ids["parent"]).info.status == "RUNNING"
    run = make_run(tmp_path)
    live = projection.send() if kept else project(run, store, names[0])
    assert live["parent"] == ids["parent"]
    at_end = project(run, store, names[1])
    contents = [everything(client, name) for name in names]
    for fingerprint in live:
        pair = [contents[0][live[fingerprint]], contents[1][at_end[fingerprint]]]
        for content in pair:
            content["tags"].pop("mlflow.parentRunId", None)
        assert pair[0] == pair[1]


def test_failed_run_is_failed_and_a_resumed_one_runs_again(tmp_path, store, client):
    parent = project(make_run(tmp_path, finished=1, status="failed"), store, "failed")["parent"]
    assert client.get_run(parent).info.status == "FAILED"
    run = make_run(tmp_path, finished=2, status="running")
    assert project(run, store, "failed")["parent"] == parent
    assert client.get_run(parent).info.status == "RUNNING"


def test_two_runs_in_one_experiment_do_not_mix(tmp_path, store, client):
    """Not even two that did the same: their steps have the same fingerprints."""
    first = project(make_run(tmp_path, name="first", tasks=("mrpc", "sst2")), store, "shared")
    before = everything(client, "shared")
    second = project(make_run(tmp_path, name="second", tasks=("mrpc", "sst2")), store, "shared")
    after = everything(client, "shared")
    assert not set(first.values()) & set(second.values())
    assert {run_id: after[run_id] for run_id in before} == before
    assert set(after) == {*first.values(), *second.values()}


def test_sequence_that_grew_continues_its_parent_run(tmp_path, store, client):
    short = project(make_run(tmp_path, tasks=("mrpc", "sst2")), store, "grown")
    run = make_run(tmp_path, tasks=("mrpc", "sst2", "biomed"))
    long = project(run, store, "grown")
    assert short.items() <= long.items() and len(long) == len(short) + 1
    assert [step for step, _ in history(client, long["parent"], "average_accuracy")] == [2, 3]


def test_changed_past_gets_a_new_parent_and_leaves_the_old_record(tmp_path, store, client):
    old = project(make_run(tmp_path, tasks=("mrpc", "sst2")), store, "changed")
    before = everything(client, "changed")
    run = make_run(tmp_path, tasks=("mrpc", "sst2"), training={"learning_rate": 1e-4})
    new = project(run, store, "changed")
    after = everything(client, "changed")
    assert not set(old.values()) & set(new.values())
    assert {run_id: after[run_id] for run_id in before} == before
    assert len(history(client, new["parent"], "score/mrpc")) == 3


def test_setting_that_is_not_identity_may_change_although_parameters_cannot(tmp_path, store, client):
    parent = project(make_run(tmp_path, tasks=("mrpc",), deepspeed="zero2"), store, "resources")["parent"]
    assert project(make_run(tmp_path, tasks=("mrpc",), deepspeed="zero3"), store, "resources")["parent"] == parent
    data = client.get_run(parent).data
    assert (data.params["deepspeed"], data.tags["curlora.changed.deepspeed"]) == ("zero2", "zero3")


def test_cell_measured_later_is_sent(tmp_path, store, client):
    run = make_run(tmp_path, tasks=("mrpc",))
    ids = project(run, store, "later")
    directory = run.finished_steps()[run.results().steps[0].fingerprint]
    metrics = run.metrics(directory)
    extra = replace(metrics.cells[-1], name="books", time=metrics.finished + 500)
    run.write_json(f"{directory}/metrics.json", replace(metrics, cells=(*metrics.cells, extra)))
    project(run, store, "later")
    assert history(client, ids["parent"], "nll/books") == [(1, extra.nll)]
    path = client.download_artifacts(ids[metrics.fingerprint], "metrics.json", str(tmp_path))
    assert json.loads(Path(path).read_text())["cells"][-1]["name"] == "books"


def test_sample_answers_are_tables_of_every_step_and_side_by_side_of_the_chain(tmp_path, store, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # `load_table` looks runs up there
    asked = {"evaluation": {"samples": {"prompts": ["Who are you?"]}}}
    plain = project(make_run(tmp_path, tasks=("mrpc", "sst2")), store, "samples")
    assert not [name for run_id in plain.values() for name in artifacts(client, run_id) if "samples.json" in name]
    run = make_run(tmp_path, tasks=("mrpc", "sst2"), **asked)
    ids = project(run, store, "samples")
    assert ids == plain  # the same runs, with the answers that were added
    before = everything(client, "samples")
    assert project(run, store, "samples") == ids
    assert everything(client, "samples") == before
    first = run.metrics(run.finished_steps()[run.results().steps[0].fingerprint])
    found = table(client, "samples", ids[first.fingerprint])
    columns = ("task", "prompt", "reference", "answer", "generated")
    assert found == [{name: getattr(sample, name) for name in columns} for sample in first.samples]
    side_by_side = table(client, "samples", ids["parent"])
    assert list(side_by_side[0]) == ["task", "prompt", "0 base", "1 mrpc", "2 sst2", "reference"]
    assert side_by_side[0]["1 mrpc"] == "answer 0 after 1 | "
    assert [row["prompt"] for row in side_by_side] == [sample.prompt for sample in first.samples]


def table(client, experiment: str, run_id: str) -> list[dict]:
    """A run's table as MLflow reads it, of runs that it lists as having one."""
    found = client.get_experiment_by_name(experiment).experiment_id
    rows = client.load_table(found, "samples.json", run_ids=[run_id]).to_dict("records")
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]


def test_joint_run_is_one_child_of_all_tasks(tmp_path, store, client):
    run = make_run(tmp_path, strategy={"name": "joint"})
    ids = project(run, store, "joint")
    assert len(ids) == 2
    child = client.get_run(ids[run.results().steps[0].fingerprint])
    assert child.data.tags["curlora.task"] == "joint"
    assert [step for step, _ in history(client, ids["parent"], "score/sst2")] == [0, 1]


def test_dead_server_is_one_clear_error_soon(tmp_path):
    run = make_run(tmp_path)
    with socket.socket() as reserved:  # bound, never listening: nobody else gets the port
        reserved.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(LineageError) as caught:
            project(run, uri, "dead")
    message = str(caught.value)
    assert f"curlora sync {run.uri}" in message and "\n" not in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("postgresql://user:secret@127.0.0.1:1/x", "refused"),
        ("sqlite:////proc/nowhere/mlflow.db", "/proc/nowhere"),
        ("nonsense://x", "nonsense"),
    ],
)
def test_unusable_store_is_named_with_its_reason(uri, reason):
    with pytest.raises(LineageError, match=reason) as caught:
        mlflow_store.initialize(uri)
    assert "check tracking.uri" in str(caught.value) and "secret" not in str(caught.value)


def test_deleted_experiment_is_named_in_the_error(tmp_path, store, client):
    run = make_run(tmp_path, finished=0, status=None)
    project(run, store, "gone")
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(LineageError, match="'gone' is deleted; restore it"):
        project(run, store, "gone")


def test_no_run_stays_active_in_this_process(chain):
    import mlflow

    assert mlflow.active_run() is None


def test_parameters_are_flat_short_and_complete():
    flat = flatten(
        {"a": {"b": [1, 2], "c": None, "d": []}, "tasks": [{"name": "x"}], "odd key!": "y", "long": "z" * 600}
    )
    assert flat.pop("long") == "z" * 499 + "…"
    assert flat == {"a.b": "1, 2", "tasks.0.name": "x", "odd key_": "y"}


@pytest.mark.parametrize(
    ("value", "stored"),
    [(1.5, 1.5), (math.inf, sys.float_info.max), (-math.inf, -sys.float_info.max), (math.nan, None), (None, None)],
)
def test_only_finite_numbers_are_sent(value, stored):
    assert finite(value) == stored


def test_ui_listens_on_loopback_only_and_a_server_needs_none(tmp_path):
    command = mlflow_store.ui_command(f"sqlite:///{tmp_path}/mlflow.db", port=5999)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--default-artifact-root") + 1] == (tmp_path / "mlruns").as_uri()
    assert own_address(f"sqlite:///{tmp_path}/mlflow.db") is None
    assert own_address("https://me:secret@example.org:5000") == "https://example.org:5000"


def test_pages_are_those_of_the_run_and_of_the_training_runs_around_it(chain, store, client):
    run, ids = chain
    number = client.get_experiment_by_name("chain").experiment_id
    runs = f"http://h:1/#/experiments/{number}/runs"
    assert pages(store, "chain", run, "http://h:1") == {
        "run": f"{runs}/{ids['parent']}?workflowType=machine_learning",
        "training runs": f"{runs}?workflowType=machine_learning",
    }
    everything = {"experiments": "http://h:1/#/experiments?workflowType=machine_learning"}
    assert pages(store, "not yet there", run, "http://h:1") == everything
    assert pages(store, None, None, "http://h:1") == everything


def test_page_of_a_run_whose_earlier_step_changed_is_the_new_one(tmp_path, store):
    run = make_run(tmp_path, tasks=("mrpc",))
    old = project(run, store, "two chains")["parent"]
    changed = make_run(tmp_path, tasks=("mrpc",), training={"learning_rate": 1e-3})
    run.write_json("events/99999999999999999-0.json", {"kind": "started", "time": START + 10**6})
    for name in run.list("events"):
        if not name.startswith("999"):
            run.remove(f"events/{name}")
    new = project(changed, store, "two chains")["parent"]
    assert new != old
    assert f"/{new}?" in pages(store, "two chains", changed, "http://h:1")["run"]


def test_importing_lineage_does_not_import_mlflow():
    code = "import sys, pipelines.lineage; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_long_chain_sends_only_what_is_new(tmp_path, store, monkeypatch):
    """A chain of n steps must not cost n² requests."""
    from mlflow import MlflowClient

    requests = []
    for name in ("log_batch", "log_inputs", "log_artifacts", "create_run"):
        original = getattr(MlflowClient, name)
        monkeypatch.setattr(
            MlflowClient, name, lambda *a, _o=original, _n=name, **k: (requests.append(_n), _o(*a, **k))[1]
        )
    project(make_run(tmp_path, tasks=[f"t{k}" for k in range(5)], finished=4), store, "long")
    run = make_run(tmp_path, tasks=[f"t{k}" for k in range(5)])
    requests.clear()
    project(run, store, "long")
    assert requests.count("create_run") == 1
    assert len(requests) < 30


def test_later_steps_of_a_kept_projection_look_nothing_up(tmp_path, store, monkeypatch):
    """Searching returns every step of the chain with all that it holds: once is enough."""
    from mlflow import MlflowClient

    tasks = [f"t{k}" for k in range(6)]
    projection = Projection(make_run(tmp_path, tasks=tasks, finished=1, status="running"), store, "kept")
    projection.send()
    requests = []
    for name in ("search_runs", "search_logged_models", "get_run", "create_run", "log_inputs", "log_batch"):
        original = getattr(MlflowClient, name)
        monkeypatch.setattr(
            MlflowClient, name, lambda *a, _o=original, _n=name, **k: (requests.append(_n), _o(*a, **k))[1]
        )
    counts = []
    for done in (2, 3, 4):
        make_run(tmp_path, tasks=tasks, finished=done, status="running")
        requests.clear()
        projection.send()
        counts.append(sorted(requests))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].count("create_run") == 1
    assert not {"search_runs", "search_logged_models"} & set(counts[0])


def test_kept_projection_begins_anew_where_its_run_was_deleted_or_the_past_changed(tmp_path, store, client):
    run = make_run(tmp_path, tasks=("mrpc", "sst2"), status="running")
    projection = Projection(run, store, "anew")
    first = projection.send()
    client.delete_run(first["parent"])
    second = projection.send()
    assert second["parent"] != first["parent"]
    run.remove("steps")
    make_run(tmp_path, tasks=("mrpc", "sst2"), training={"learning_rate": 1e-4}, status="running")
    assert not set(second.values()) & set(projection.send().values())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("/data/mrpc", ("local", "uri", "/data/mrpc")),
        ("s3://bucket/mrpc/train.jsonl", ("s3", "uri", "s3://bucket/mrpc/train.jsonl")),
        ("https://example.org/train.jsonl", ("http", "url", "https://example.org/train.jsonl")),
        ("nyu-mll/glue", ("hugging_face", "path", "nyu-mll/glue")),
    ],
)
def test_mlflow_itself_makes_a_source_of_every_dataset(data, expected):
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json

    kind, field, value = expected
    found, fields = dataset_source(data)
    source = get_dataset_source_from_json(json.dumps(fields), found)
    assert (source._get_source_type(), source.to_dict()[field]) == (kind, value)
