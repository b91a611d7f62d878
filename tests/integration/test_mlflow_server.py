"""A chain against a real MLflow server that dies in the middle: what MLflow holds in the end, and what it can do."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.lineage import registry
from pipelines.lineage.projection import project
from pipelines.lineage.store import initialize
from tests.bench import wait_for
from tests.browser import CHROMIUM, Browser
from tests.cluster.chaos import Server
from tests.holdings import holdings
from tests.unit.sample_run import make_run

TEXTS = ("Compute the inverse of a matrix.", "--token TEXT", "def split(x): return x")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    store = f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db"
    initialize(store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = Server(store, free.getsockname()[1])
    found.start()
    wait_for(lambda: answers(found), found.process)
    yield found
    found.kill()


def answers(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) == 0


@pytest.fixture(scope="module")
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(server.address)


@pytest.fixture(scope="module")
def interrupted(bench, server, client):
    """A finished run whose server was killed during its second step and started again after its end."""
    changes = {
        "training": bench.raw["training"] | {"max_steps": 100},
        "resources": {"workers": 1},
        "tracking": {"uri": server.address, "experiment": "interrupted", "register_as": "docs-bot"},
        "gate": {"max_forgetting": 0.9, "max_nll_increase": 9, "max_perplexity_ratio": 99},
    }
    config = bench.config("interrupted", **changes)
    with ThreadPoolExecutor(1) as driver:
        run = driver.submit(bench.run_warm, config)
        wait_for(lambda: run.done() or ((e := client.get_experiment_by_name("interrupted")) and steps_of(client, e)))
        assert not run.done(), "it was over before its server could be killed"
        server.kill()
        during = run.result(timeout=600)
    server.start()
    wait_for(lambda: answers(server), server.process)
    for _ in range(2):  # once more changes nothing
        bench.command("sync", "interrupted")
    return during, json.loads((bench.directory("interrupted") / "results.json").read_text())


def steps_of(client, experiment) -> list:
    return client.search_runs([experiment.experiment_id], "tags.`curlora.kind` = 'step'")


def test_run_goes_on_without_its_server_and_the_verdict_waits(interrupted):
    during, after = interrupted
    assert during["status"] == "finished" and during["gate"]["passed"] is None and during["registry"] is None
    assert after["gate"]["passed"] and after["registry"]["promoted"]
    assert after["scores"] == during["scores"]


def test_step_records_what_it_was_computed_with(bench, interrupted, client):
    _, results = interrupted
    params = client.get_run(results["steps"][0]["mlflow_run_id"]).data.params
    wanted = ("training.seed", "evaluation.seed", "environment.deepspeed_stage", "environment.hardware.cores")
    assert all(name in params for name in wanted)
    assert bench.metrics(results, 0)["classes"]["part"]


def test_afterwards_mlflow_holds_what_it_would_have_held_and_nothing_twice(bench, interrupted, client, tmp_path):
    from mlflow import MlflowClient

    fresh = f"sqlite:///{tmp_path}/fresh.db"
    bench.command("sync", "interrupted", "--uri", fresh)
    found = holdings(client, "interrupted", "docs-bot")
    wanted = holdings(MlflowClient(fresh), "interrupted", "docs-bot")
    assert (found["runs"], found["models"]) == (wanted["runs"], wanted["models"])
    assert len(found["runs"]) == 4 and len(found["models"]) == 3 and len(found["versions"]) == 1
    assert found["aliases"] == {"candidate": 1, "champion": 1}


def test_best_adapter_is_found_by_a_metric_on_its_data(interrupted, client):
    _, results = interrupted
    experiment = client.get_experiment_by_name("interrupted").experiment_id
    order = [{"field_name": "metrics.score/text", "dataset_name": "text/test", "ascending": True}]
    best = client.search_logged_models([experiment], order_by=order, max_results=1)[0]
    assert best.tags["curlora.step_fingerprint"] == results["steps"][-1]["fingerprint"]
    assert best.tags["curlora.parent_fingerprint"] == results["steps"][-2]["fingerprint"]


def test_champion_in_a_fresh_process_predicts_what_predict_predicts(bench, interrupted, server):
    code = (
        "import json, sys, mlflow, pandas\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/docs-bot@champion')\n"
        "frame = pandas.DataFrame({'text': sys.argv[2:]})\n"
        "tasks = ('part', 'word', 'text')\n"
        "print(json.dumps({t: model.predict(frame, params={'task': t}).to_dict('records') for t in tasks}))\n"
    )
    environment = os.environ | {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    asked = [sys.executable, "-W", "ignore", "-c", code, server.address, *TEXTS]
    answered = json.loads(subprocess.check_output(asked, env=environment, text=True).splitlines()[-1])
    for task, found in answered.items():
        texts = [part for text in TEXTS for part in ("--text", text)]
        lines = bench.command("predict", "interrupted", "--task", task, "--json", *texts).splitlines()
        assert found == [json.loads(line) for line in lines]


def test_lineage_from_the_server_and_from_the_run_agree(bench, interrupted, server):
    of_run = bench.command("lineage", "interrupted", "--json")
    assert bench.command("lineage", "models:/docs-bot@champion", "--uri", server.address, "--json") == of_run


def test_two_chains_at_once_into_one_server_do_not_mix(server, client, tmp_path):
    runs = [make_run(tmp_path, name=name, tasks=("mrpc", "sst2")) for name in ("left", "right")]
    from mlflow import MlflowClient

    with ThreadPoolExecutor(2) as both:  # the experiment does not exist yet: both want to make it
        first, second = both.map(lambda run: project(run, server.address, "both"), runs)
    assert not set(first.values()) & set(second.values())
    for run, ids in zip(runs, (first, second), strict=True):
        alone = project(run, f"sqlite:///{tmp_path}/{run.name}.db", "both")
        assert set(alone) == set(ids)
    held = holdings(client, "both")
    for run in runs:
        alone = holdings(MlflowClient(f"sqlite:///{tmp_path}/{run.name}.db"), "both")
        mine = [entry for entry in held["runs"] if entry["tags"]["curlora.run"] == run.name]
        assert mine == alone["runs"]
        assert [m for m in held["models"] if m["tags"]["curlora.run"] == run.name] == alone["models"]


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """What `webbrowser` starts: a command that keeps the addresses that it is to open."""
    script, opened = tmp_path / "browser", tmp_path / "opened"
    script.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(script))
    return opened


def page_of(tmp_path, client, experiment: str, tracking: str) -> tuple:
    run = make_run(tmp_path, name=experiment, tasks=("mrpc",), tracking={"uri": tracking, "experiment": experiment})
    parent = project(run, tracking, experiment)["parent"]
    number = client.get_experiment_by_name(experiment).experiment_id
    return run, f"/#/experiments/{number}/runs/{parent}?workflowType=machine_learning"


def test_ui_of_a_run_on_a_server_is_the_address_of_its_page(bench, client, server, tmp_path, browser):
    run, page = page_of(tmp_path, client, "served", server.address)
    lines = bench.command("ui", run.uri, "--open").splitlines()
    assert lines[0] == f"run:           {server.address}{page}"
    assert lines[1].startswith("training runs: ") and "workflowType=machine_learning" in lines[1]
    wait_for(browser.exists)
    assert browser.read_text().strip() == server.address + page


def test_ui_of_a_run_in_a_database_serves_its_page_and_opens_it(tmp_path, browser):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    initialize(store)
    run, page = page_of(tmp_path, MlflowClient(store), "kept", store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "pipelines", "ui", run.uri, "--port", port, "--open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for(browser.exists, process)
        assert browser.read_text().strip() == f"http://127.0.0.1:{port}{page}"
        if CHROMIUM:
            text = asyncio.run(shown(tmp_path / "profile", f"http://127.0.0.1:{port}{page}", "kept"))
            assert "Training runs" not in text and "Quality" not in text  # as on the pages for LLM applications
    finally:
        process.terminate()
        process.wait(30)


async def shown(profile, address: str, wanted: str) -> str:
    """The text of a page, once it has the wanted word."""
    profile.mkdir()
    async with Browser(profile) as browser:
        await browser.call("Page.navigate", url=address)
        for _ in range(120):
            text = await browser.value("document.body ? document.body.innerText : ''")
            if wanted in text:
                return text
            await asyncio.sleep(0.5)
    raise AssertionError(f"'{wanted}' does not appear; the page says: {text[:300]}")


def test_champion_is_asked_for_over_the_server(interrupted, server):
    found = registry.champion(server.address, "docs-bot")
    assert found.version == 1 and found.tasks == ("part", "word", "text")
