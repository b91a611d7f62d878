"""From a finished run to a champion and back, in a real registry."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from click.testing import CliRunner
from sample_run import make_run

from pipelines.cli.app import main
from pipelines.errors import LineageError
from pipelines.lineage import registry
from pipelines.promotion.promotion import Refused, decide, promote_run, restore
from pipelines.promotion.publish import sync
from pipelines.runs.directory import RunDirectory

TASKS = ("mrpc", "sst2")


@pytest.fixture
def make(tmp_path, store, request):
    """A finished run that registers as a model of the test's own; `drop` makes it worse on every task."""
    model = request.node.name.replace("[", "-").replace("]", "")

    def made(name: str, drop: float = 0.0, gate: dict | None = None, uri: str = store) -> RunDirectory:
        tracking = {"uri": uri, "experiment": "promotion", "register_as": model}
        limits = {"max_forgetting": 0.05} if gate is None else gate
        run = make_run(tmp_path, name=name, tasks=TASKS, drop=drop, tracking=tracking, gate=limits)
        return run

    made.model = model
    return made


def test_first_run_is_judged_by_absolute_limits_and_becomes_champion(make, store, client):
    run = make("first")
    _, _, warned = sync(run)
    assert warned == []
    champion = registry.champion(store, make.model)
    last = run.results().steps[-1]
    assert (champion.version, champion.run_uri, champion.step_directory) == (1, run.uri, last.directory)
    assert champion.tasks == TASKS
    metrics = run.metrics(last.directory)
    assert champion.digests["sst2"] == metrics.data["sst2"].train.digest
    assert champion.base_fingerprint == run.metrics(f"steps/{run.list('steps')[0]}").fingerprint
    assert registry.by_alias(store, make.model, "candidate") == champion
    assert run.results().gate["passed"] and run.results().registry["promoted"]
    kinds = [event.kind for _, event in run.events()]
    assert kinds.count("gate") == kinds.count("promoted") == 1


def test_candidate_that_forgot_is_refused_and_the_champion_stays(make, store, client):
    sync(make("good"))
    forgetful = make("forgetful", drop=0.2)
    sync(forgetful)
    gate = forgetful.results().gate
    assert gate["against"]["version"] == 1 and not gate["passed"]
    assert "mrpc: accuracy" in gate["reasons"][0]
    assert registry.champion(store, make.model).version == 1
    candidate = registry.by_alias(store, make.model, "candidate")
    assert (candidate.version, candidate.gate, candidate.promoted) == (2, "refused", "")
    assert "mrpc" in client.get_model_version(make.model, "2").tags["curlora.gate_reasons"]
    assert "**Gate: refused**" in client.get_model_version(make.model, "2").description
    page = forgetful.read_bytes("report.html").decode()
    assert "▼ refused" in page and "p &lt; 0.05" in page
    parent = client.search_runs(
        [client.get_experiment_by_name("promotion").experiment_id],
        "tags.`curlora.run` = 'forgetful' and tags.`curlora.kind` = 'chain' and tags.`curlora.gate` = 'refused'",
    )
    assert any(run.data.tags["curlora.run_uri"] == forgetful.uri for run in parent)


def test_better_candidate_is_promoted_and_the_former_restored(make, store):
    sync(make("one"))
    sync(make("two", drop=-0.02))
    assert registry.champion(store, make.model).version == 2
    one = RunDirectory(registry.by_number(store, make.model, 1).run_uri)
    done = restore(one, 1, reason="misreads invoices")
    assert registry.by_alias(store, make.model, "candidate").version == 2
    assert (done.version.version, done.before.version) == (1, 2)
    changes = [(c["version"], c["before"], c["why"]) for c in registry.changes(store, make.model)]
    assert changes == [(1, 2, "restored: misreads invoices"), (2, 1, "the gate passed"), (1, None, "the gate passed")]


def test_sending_again_changes_no_alias(make, store):
    sync(make("one"))
    two = make("two", drop=-0.02)
    sync(two)
    restore(two, 1)
    for _ in range(2):
        sync(two)
    assert registry.champion(store, make.model).version == 1
    assert registry.by_alias(store, make.model, "candidate").version == 2
    assert len(registry.changes(store, make.model)) == 3


def test_a_refused_version_needs_force_and_a_reason(make, store):
    sync(make("good"))
    bad = make("bad", drop=0.2)
    sync(bad)
    with pytest.raises(Refused, match="mrpc"):
        promote_run(bad)
    with pytest.raises(Refused, match="never in use"):
        restore(bad, 2)
    command = CliRunner()
    called = command.invoke(main, ["promote", bad.uri])
    assert called.exit_code == 1 and "refused: mrpc" in called.output
    assert command.invoke(main, ["promote", bad.uri, "--force"]).exit_code == 2
    called = command.invoke(main, ["promote", bad.uri, "--force", "--reason", "demonstration", "--json"])
    assert called.exit_code == 0 and json.loads(called.output)["why"] == "forced: demonstration"
    assert registry.champion(store, make.model).version == 2
    assert command.invoke(main, ["promote", bad.uri, "--to", "9"]).exit_code == 2


def test_promotion_by_hand_where_the_gate_only_judges(make, store):
    run = make("run", gate={"promote": False, "max_forgetting": 0.1})
    sync(run)
    assert registry.champion(store, make.model) is None
    assert registry.by_alias(store, make.model, "candidate").gate == "passed"
    assert promote_run(run).before is None
    assert registry.champion(store, make.model).version == 1


def test_hook_gets_the_version_without_a_shell(make, store, tmp_path):
    target = tmp_path / "told; rm -rf nothing"
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CURLORA_MODEL_URI'])"
    hook = [sys.executable, "-c", code, str(target)]
    sync(make("run", gate={"max_forgetting": 0.1, "on_promotion": hook}))
    assert target.read_text() == f"models:/{make.model}/1"


def test_hook_that_fails_is_reported_and_the_promotion_stands(make, store):
    hook = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    run = make("run", gate={"max_forgetting": 0.1, "on_promotion": hook})
    _, _, warned = sync(run)
    assert warned == [f"gate.on_promotion {sys.executable} ended with 1: no room"]
    assert registry.champion(store, make.model).version == 1
    assert CliRunner().invoke(main, ["promote", run.uri]).exit_code == 1


def test_champion_whose_run_is_gone_is_read_from_mlflow(make, store):
    good = make("good")
    sync(good)
    shutil.rmtree(good.root)
    bad = make("bad", drop=0.2)
    verdict = decide(bad, bad.config(), bad.results())
    assert verdict["against"]["version"] == 1 and "exact McNemar test" in verdict["reasons"][0]


def test_without_mlflow_the_verdict_waits(make, store, tmp_path):
    run = make("run", uri="http://127.0.0.1:9")
    with pytest.raises(LineageError):
        sync(run)
    verdict = decide(run, run.config(), run.results())
    assert verdict["passed"] is None and "champion cannot be read" in verdict["reasons"][0]
    assert registry.champion(store, make.model) is None


def test_another_store_gets_the_version_but_no_champion(make, store, tmp_path):
    run = make("run")
    sync(run)
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):
        sync(run, other)
    copy = registry.by_alias(other, make.model, "candidate")
    assert (copy.version, copy.gate) == (1, "passed")
    assert registry.champion(other, make.model) is None


def test_a_run_without_a_registered_model_says_how_to_get_one(tmp_path, store):
    run = make_run(tmp_path, tasks=TASKS, tracking={"uri": store})
    called = CliRunner().invoke(main, ["promote", run.uri])
    assert called.exit_code == 2 and "tracking.register_as: is null" in called.output
