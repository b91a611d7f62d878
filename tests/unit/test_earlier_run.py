"""A run directory that an earlier version of this project wrote is understood to the last byte.

`tests/fixtures/earlier-run` holds the base, the data and the run of `chain.yaml`, made by commit 83eee08 (figures and
page left out): `curlora run chain.yaml`.
"""

import shutil
from pathlib import Path

import pytest
import torch

from pipelines.chain.plan import planned
from pipelines.chain.results import build_results
from pipelines.config.loading import load_config
from pipelines.inference.predict import load_trained
from pipelines.runs.directory import RunDirectory
from pipelines.runs.event import Event
from pipelines.runs.results import Results
from pipelines.runs.step_record import StepRecord

FIXTURE = Path(__file__).parents[1] / "fixtures" / "earlier-run"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    shutil.copytree(FIXTURE, tmp_path / "chain")
    monkeypatch.chdir(tmp_path / "chain")
    config = load_config("chain.yaml")
    return config, RunDirectory(config.run_uri)


def test_nothing_of_it_is_missing_under_the_same_fingerprints(earlier):
    config, run = earlier
    _, plan = planned(config, run)
    assert [step.directory for step in plan.steps] == ["steps/1-reviews-45c3aad5", "steps/2-prose-d4911156"]
    assert plan.base_directory == "steps/0-base-1323b388"
    assert plan.missing_steps(run) == []
    assert not any(plan.missing_cells(run).values())


def test_its_results_are_computed_alike(earlier):
    config, run = earlier
    config, plan = planned(config, run)
    stored = run.read_json("results.json")
    again = build_results(config, plan, run, "finished").to_json()
    stored["base_model"] = again["base_model"]  # where it lay then
    assert again == stored


def test_its_adapter_gives_the_logits_that_its_worker_recorded(earlier):
    _, run = earlier
    step = "steps/2-prose-d4911156"
    recorded = run.read_json(f"{step}/metrics.json")["self_test"]
    path = run.path("config.yaml")
    text = Path(path).read_text().replace("/tmp/chain", str(Path.cwd()))
    Path(path).write_text(text)
    trained = load_trained(run, "prose")
    with torch.no_grad():
        logits = trained.model(input_ids=torch.tensor([recorded["input_ids"]])).logits[0, -1]
    wanted = torch.tensor(recorded["last_logits"])
    assert (logits[: len(wanted)] - wanted).abs().max() <= 1e-5


def test_its_records_are_written_again_as_they_were(earlier):
    _, run = earlier
    kinds = {"metrics.json": StepRecord, "results.json": Results}
    paths = [path.removeprefix(f"{run.root}/") for path in run.fs.find(run.root)]
    records = [p for p in paths if p.startswith("events/") or p.rpartition("/")[2] in kinds]
    assert len(records) > 10
    for path in records:
        kind = kinds.get(path.rpartition("/")[2], Event)
        assert kind.from_json(run.read_json(path)).to_json() == run.read_json(path)
