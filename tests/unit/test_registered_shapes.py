"""Every shape of chain is registered, promoted, restored and traced to its base, in a real registry."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from sample_run import make_grown_run, make_run

from pipelines.cli.app import main
from pipelines.lineage import registry
from pipelines.lineage.ancestry import from_mlflow, from_run
from pipelines.lineage.projection import project
from pipelines.promotion.promotion import promote_run, restore
from pipelines.promotion.publish import sync
from pipelines.reporting.page import write_report
from pipelines.runs.directory import RunDirectory

HEADS = ("tickets", "topics")
SHAPES = {
    "heads": {"tasks": HEADS, "retention": ()},
    "one": {"tasks": HEADS[:1], "retention": ()},
    "joint": {"tasks": HEADS, "retention": (), "strategy": {"name": "joint"}},
    "probe": {"tasks": HEADS, "retention": (), "adapter": {"type": "none"}},
    "retention": {"tasks": HEADS},
    "generation": {"tasks": ("chat", "answers"), "retention": ()},
    "text": {"tasks": ("biomed", "code"), "retention": ()},
    "mixed": {"tasks": ("tickets", "chat"), "retention": ()},
}


def options(store: str, model: str) -> dict:
    return {
        "tracking": {"uri": store, "experiment": model, "register_as": model},
        "gate": {"max_forgetting": 0.2, "max_nll_increase": 1.0, "max_perplexity_ratio": 2.0},
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_becomes_champion_gives_way_and_comes_back_and_is_traced_to_its_base(shape, store, tmp_path):
    settings = options(store, shape)
    runs = [make_run(tmp_path, name=name, drop=d, **SHAPES[shape], **settings) for name, d in (("a", 0), ("b", -0.02))]
    for number, run in enumerate(runs, 1):
        _, _, warned = sync(run)
        assert warned == []
        champion = registry.champion(store, shape)
        assert (champion.version, champion.step_fingerprint) == (number, run.results().steps[-1].fingerprint)
        assert champion.base_fingerprint == run.results().base_fingerprint
        assert run.results().registry["promoted"]
    assert restore(runs[1], 1).version.version == 1
    assert promote_run(runs[1]).version.version == 2
    last = runs[1].results().steps[-1]
    ancestry = from_run(runs[1], last.directory)
    assert (ancestry.links[0].title, ancestry.links[0].fingerprint) == ("base", runs[1].results().base_fingerprint)
    assert len(ancestry.links) == 1 + len(runs[1].results().steps)
    assert from_mlflow(store, f"models:/{shape}@champion") == ancestry


def test_the_command_shows_the_lineage_of_a_chain_whose_base_was_not_scored(store, tmp_path):
    run = make_run(tmp_path, **SHAPES["heads"], **options(store, "command"))
    sync(run)
    called = [CliRunner().invoke(main, ["lineage", name, "--uri", store]) for name in ("models:/command/1", run.uri)]
    assert [found.exit_code for found in called] == [0, 0], called
    assert called[0].output == called[1].output
    assert f"fingerprint {run.results().base_fingerprint}" in called[0].output


@pytest.mark.parametrize("shape", ["heads", "generation"])
def test_what_grew_from_it_in_another_run_is_registered_as_well(shape, store, tmp_path):
    model = f"grown-{shape}"
    settings = options(store, model)
    first = make_run(tmp_path, name="first", **SHAPES[shape], **settings)
    sync(first)
    grown = make_grown_run(tmp_path, first, "code", name="grown", retention=(), **settings)
    _, _, warned = sync(grown)
    assert warned == []
    ancestry = from_run(grown, grown.results().steps[-1].directory)
    assert [link.run_uri for link in ancestry.links] == [first.uri] * (1 + len(first.results().steps)) + [grown.uri]
    assert from_mlflow(store, f"models:/{model}@champion") == ancestry


def test_nothing_is_scored_on_the_adapter_that_a_chain_starts_from(store, tmp_path):
    """Its own tasks are not listed, and the new one has a head that is still to be trained."""
    settings = options(store, "silent")
    first = make_run(tmp_path, name="first", tasks=HEADS[:1], retention=(), **settings)
    sync(first)
    start = f"{first.uri}/{first.results().steps[-1].fingerprint}"
    run = make_run(tmp_path, name="next", tasks=HEADS[1:], retention=(), start_from=start, **settings)
    assert not any(name.startswith("0-") for name in run.list("steps"))
    assert sync(run)[2] == []
    ancestry = from_run(run, run.results().steps[-1].directory)
    assert [link.title for link in ancestry.links] == ["base", "1 tickets", "1 topics"]
    registered = run.results().registry
    assert from_mlflow(store, registered["uri"]) == ancestry
    assert not registered["promoted"]  # the champion has learned a task that this run was not scored on


def test_a_base_without_scores_has_its_place_in_report_and_mlflow(store, tmp_path):
    run = make_run(tmp_path, tasks=HEADS, retention=())
    ids = project(run, store, "unscored")
    write_report(run)
    assert run.results().base_fingerprint in run.read_bytes("report.html").decode()
    from mlflow import MlflowClient

    parent = MlflowClient(store).get_run(ids["parent"])
    assert parent.data.tags["curlora.base_fingerprint"] == run.results().base_fingerprint
    assert project(run, store, "unscored") == ids


def test_a_run_that_cannot_be_registered_fails_loudly_until_it_can(store, tmp_path):
    settings = options(store, "broken")
    run = make_run(tmp_path, tasks=HEADS, retention=(), **settings)
    file = f"{run.results().steps[-1].directory}/adapter/adapter_model.safetensors"
    content = run.read_bytes(file)
    run.remove(file)
    called = CliRunner().invoke(main, ["sync", run.uri])
    assert called.exit_code == 1, called.output
    assert "not registered as 'broken'" in called.output and "adapter_model.safetensors" in called.output
    assert "up to date" not in called.output
    assert "Not registered as <code>broken</code>" in run.read_bytes("report.html").decode()
    assert registry.champion(store, "broken") is None
    run.write_bytes(file, content)
    called = CliRunner().invoke(main, ["sync", run.uri])
    assert called.exit_code == 0, called.output
    assert registry.champion(store, "broken").version == 1
    assert RunDirectory(run.uri).results().registry["promoted"]
