"""The ancestry of an adapter: complete, and the same from run directories and from MLflow."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
from click.testing import CliRunner
from sample_run import make_grown_run, make_run

from pipelines.cli.app import main
from pipelines.errors import ConfigError, RunDirectoryError
from pipelines.lineage.ancestry import as_text, find, from_mlflow, from_run
from pipelines.lineage.projection import project
from pipelines.lineage.registry import describe, register
from pipelines.reporting.ancestry_figure import draw_ancestry, write_ancestry
from pipelines.reporting.page import write_report
from pipelines.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory, chain) -> RunDirectory:
    """A run that started from the chain's last adapter."""
    return make_grown_run(tmp_path_factory.mktemp("grown"), chain, "code", name="grown")


def last(run: RunDirectory) -> str:
    return run.results().steps[-1].directory


def test_from_the_base_to_the_adapter_with_data_settings_and_scores(chain):
    ancestry = from_run(chain, last(chain))
    assert [link.title for link in ancestry.links] == ["base", "1 mrpc", "2 sst2", "3 biomed"]
    assert [link.parent for link in ancestry.links[1:]] == [link.fingerprint for link in ancestry.links[:-1]]
    step = ancestry.links[2]
    metrics = chain.metrics(step.step_directory)
    assert step.data == {"sst2": metrics.data["sst2"].train.to_json() | {"used": 4}}
    assert step.settings["training.learning_rate"] == "0.003"
    assert step.scores["score/mrpc"] == chain.results().scores[2][0]
    assert step.scores["nll/wikitext2"] == chain.results().nll["wikitext2"][2]
    assert ancestry.tasks == ("mrpc", "sst2", "biomed") and set(ancestry.digests) == set(ancestry.tasks)


def test_run_directory_and_mlflow_agree(chain, store):
    ids = project(chain, store, "agree")
    ancestry = from_run(chain, last(chain))
    version, _ = register(store, "agree", ids[ancestry.links[-1].fingerprint], ancestry)
    assert from_mlflow(store, version.uri) == ancestry
    as_json = [json.dumps(found.to_json()) for found in (from_mlflow(store, version.uri), ancestry)]
    assert as_json[0] == as_json[1]


def test_both_go_on_in_the_run_that_a_chain_started_from(chain, grown, store):
    ancestry = from_run(grown, last(grown))
    assert [link.title for link in ancestry.links] == ["base", "1 mrpc", "2 sst2", "3 biomed", "1 code"]
    assert [link.run_uri for link in ancestry.links] == [chain.uri] * 4 + [grown.uri]
    project(chain, store, "origin")
    ids = project(grown, store, "grown")  # another experiment
    version, _ = register(store, "grown", ids[ancestry.links[-1].fingerprint], ancestry)
    assert version.tasks == ("mrpc", "sst2", "biomed", "code")
    assert from_mlflow(store, version.uri) == ancestry


def test_an_origin_that_is_gone_is_named(tmp_path, chain):
    orphan = make_grown_run(tmp_path, chain, "code", name="orphan")
    directory = last(orphan)
    orphan.write_json(f"{directory}/metrics.json", replace(orphan.metrics(directory), parent_run="/gone"))
    with pytest.raises(RunDirectoryError, match="/gone has no step"):
        from_run(orphan, directory)


@pytest.mark.parametrize("form", ["{run}", "{run}/sst2", "{run}/2", "{run}/{directory}", "{run}/{directory}/adapter"])
def test_an_adapter_has_several_names(chain, form):
    directory = chain.results().steps[1].directory
    ancestry = find(form.format(run=chain.uri, directory=directory))
    assert ancestry.links[-1].title == ("3 biomed" if form == "{run}" else "2 sst2")


@pytest.mark.parametrize("name", ["models:/nobody@champion", "models:/nobody/3", "models:/nobody"])
def test_a_version_that_is_not_there_is_bad_input(store, name):
    with pytest.raises(ConfigError, match="is no registered version"):
        find(name, uri=store)


def test_text_names_settings_once_and_again_where_they_change(tmp_path):
    run = make_run(tmp_path, tasks=("mrpc", "sst2"))
    directory = last(run)
    metrics = run.metrics(directory)
    metrics.setting.training["learning_rate"] = 0.5
    run.write_json(f"{directory}/metrics.json", metrics)
    text = as_text(from_run(run, directory))
    assert text.count("training.seed 0") == 1
    assert "now training.learning_rate 0.5\n" in text
    assert metrics.data["sst2"].train.digest in text


def test_rows_are_those_that_were_trained_on(tmp_path, store):
    run = make_run(tmp_path, tasks=("mrpc",), training={"max_train_examples": 3}, tracking={"uri": store})
    ancestry = from_run(run, last(run))
    assert "trained on mrpc: 3 of 4 rows, digest" in as_text(ancestry)
    assert "| mrpc | 3 of 4 rows |" in describe(ancestry)
    assert any("mrpc: 3 of 4 rows" in text.get_text() for text in draw_ancestry(ancestry).axes[0].texts)
    write_report(run)
    assert "mrpc, 3 of 4 rows, digest" in run.read_bytes("report.html").decode()
    ids = project(run, store, "rows")
    version, _ = register(store, "rows", ids[ancestry.links[-1].fingerprint], ancestry)
    assert from_mlflow(store, version.uri) == ancestry
    whole = make_run(tmp_path, name="whole", tasks=("mrpc",), training={"max_train_examples": 9})
    assert "trained on mrpc: 4 rows, digest" in as_text(from_run(whole, last(whole)))


def test_command_prints_text_json_and_a_figure(chain, tmp_path):
    figure = tmp_path / "lineage.png"
    called = CliRunner().invoke(main, ["lineage", f"{chain.uri}/2", "--json", "--figure", str(figure)])
    assert called.exit_code == 0, called.output
    assert [link["label"] for link in json.loads(called.output)["links"]] == ["base", "mrpc", "sst2"]
    assert struct.unpack(">II", figure.read_bytes()[16:24])[0] >= 600
    assert "2 sst2" in CliRunner().invoke(main, ["lineage", f"{chain.uri}/2"]).output
    assert CliRunner().invoke(main, ["lineage", "nowhere"]).exit_code == 2


def test_a_figure_of_another_kind_is_refused(chain, tmp_path):
    with pytest.raises(ConfigError, match=r"'x\.doc' is not a \.png"):
        write_ancestry(from_run(chain, last(chain)), tmp_path / "x.doc")


def test_every_adapter_of_a_long_chain_is_drawn(tmp_path):
    run = make_run(tmp_path, tasks=[f"t{k}" for k in range(30)])
    figure = draw_ancestry(from_run(run, last(run)))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.split()[1] for text in texts] == ["base", *(f"t{k}" for k in range(30))]
