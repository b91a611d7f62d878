"""`curlora run --dry-run` refuses what `curlora run` refuses about `start_from`, in the same words."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipelines.chain.driver import run_chain
from pipelines.chain.plan import make_plan
from pipelines.chain.results import build_results
from pipelines.cli.app import main
from pipelines.config.loading import parse_config
from pipelines.data.sources import digest_of
from pipelines.errors import ConfigError, RunDirectoryError
from pipelines.runs.directory import RunDirectory
from pipelines.runs.step_record import PublishedFile, Setting, Split, TaskData
from pipelines.workers.resident_model import sha256
from tests.conftest import minimal, write_jsonl, write_reviews
from tests.unit.sample_records import step_record


@pytest.fixture
def raw(tmp_path, model, tokenizer) -> dict:
    """A configuration of two tasks on a real base."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tasks = [
        {"name": name, "kind": "classification", "text": "sentence", "data": str(write_reviews(tmp_path / name, name))}
        for name in ("first", "second")
    ]
    changes = {"tasks": tasks, "base_model": {"path": str(tmp_path / "base")}, "tracking": None}
    return minimal(tmp_path, tasks[0]["data"], **changes) | {"adapter": {"type": "curlora", "r": 4}}


@pytest.fixture
def earlier(raw, tmp_path) -> RunDirectory:
    """A finished run of the first task, with real heads."""
    import torch
    from safetensors.torch import save_file

    base = raw["base_model"] | {"dtype": "float32"}
    config = parse_config(raw | {"name": "earlier", "tasks": raw["tasks"][:1], "base_model": base})
    run, plan = RunDirectory(config.run_uri), make_plan(config)
    run.open_for_writing(config)
    (step,) = plan.steps
    folder = tmp_path / "published"
    (folder / "adapter").mkdir(parents=True)
    save_file({"first.weight": torch.zeros(2, 16), "first.bias": torch.zeros(2)}, folder / "heads.safetensors")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    run.upload(folder, step.directory)
    files = {str(f.relative_to(folder)): PublishedFile(f.stat().st_size, sha256(f)) for f in folder.rglob("*.*")}
    row = step_record(
        step.fingerprint,
        step.tasks,
        parent=step.parent,
        depth=1,
        setting=Setting.of(config),
        files=files,
        data={"first": TaskData(Split(digest_of(config.task("first"), "train"), 24))},
    )
    run.write_json(f"{step.directory}/metrics.json", row)
    run.write_json("results.json", build_results(config, plan, run, "finished"))
    return run


def step_of(run: RunDirectory) -> str:
    return run.results().steps[0].directory


def other_adapter(raw, run):
    return raw | {"adapter": {"type": "curlora", "r": 3}}


def other_folder(raw, run):
    return raw | {"start_from": raw["base_model"]["path"]}


def unknown_step(raw, run):
    return raw | {"start_from": f"{run.uri}/ghost"}


def no_alias(raw, run):
    return raw | {"start_from": "models:/desk"}


def no_registry(raw, run):
    return raw | {"start_from": "models:/desk@champion"}


def unreachable_registry(raw, run):
    return raw | {"start_from": "models:/desk@champion", "tracking": {"uri": "http://127.0.0.1:9"}}


def unfinished_step(raw, run):
    run.remove(f"{step_of(run)}/metrics.json")
    return raw


def nothing_new(raw, run):
    return raw | {"tasks": raw["tasks"][:1]}


def other_strategy(raw, run):
    run.write_json(f"{step_of(run)}/strategy/state.json", {})
    return raw | {"strategy": {"name": "ewc"}}


def other_base(raw, run):
    base = f"{raw['base_model']['path']}-other"
    shutil.copytree(raw["base_model"]["path"], base)
    with open(f"{base}/config.json", "a", encoding="utf-8") as file:
        file.write("\n")
    return raw | {"base_model": {"path": base}}


def missing_file(raw, run):
    run.remove(f"{step_of(run)}/adapter/adapter_model.safetensors")
    return raw


def damaged_file(raw, run):
    run.write_bytes(f"{step_of(run)}/adapter/adapter_model.safetensors", b"weighty")
    return raw


def other_classes(raw, run):
    """Its training data has changed as well, so that it is trained again."""
    folder = Path(raw["tasks"][0]["data"])
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"sentence": f"a film {i}", "label": i % 3} for i in range(12)])
    (folder / "labels.json").unlink()
    return raw


def outgrown_stack(raw, run):
    """Two blocks of rank 4 fit into a layer with 8 outputs, a third one does not."""
    adapter = raw["adapter"] | {"carry": "stack"}
    directory = step_of(run)
    row = run.metrics(directory)
    adapter_then = row.setting.adapter | {"carry": "stack"}
    run.write_json(
        f"{directory}/metrics.json", replace(row, depth=2, setting=replace(row.setting, adapter=adapter_then))
    )
    return raw | {"adapter": adapter}


REFUSED = {
    other_adapter: "adapter.r: is 3, but the adapter of",
    other_folder: "is not a run with results; write <run URI or path>/<step>, or a folder with adapter_config.json",
    unknown_step: "has no finished step 'ghost'; finished: first",
    no_alias: "has no alias; write models:/<name>@champion",
    no_registry: "needs a model registry; set tracking.uri",
    unreachable_registry: "MLflow at http://127.0.0.1:9 cannot be used",
    unfinished_step: "has no finished step 'first'; finished: none",
    nothing_new: "has learned all of them already; add one",
    other_strategy: "set strategy.name: sequential",
    other_base: "is not the base that",
    missing_file: "adapter_model.safetensors is missing or damaged; restore it, or start elsewhere",
    damaged_file: "adapter_model.safetensors is missing or damaged; restore it, or start elsewhere",
    other_classes: "'first' has 3 classes, but its trained head in",
    outgrown_stack: "3 blocks of r=4 do not fit",
}


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(raw: dict):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
        return CliRunner().invoke(main, ["run", "c.yaml", "--dry-run"])

    return invoke


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_run_refuses_is_refused_by_a_dry_run(change, raw, earlier, dry_run):
    raw = change(raw | {"start_from": f"{earlier.uri}/first"}, earlier)
    called = dry_run(raw)
    assert called.exit_code == 2, called.output
    assert REFUSED[change] in " ".join(called.output.split())
    with pytest.raises((ConfigError, RunDirectoryError)) as refused:
        run_chain(parse_config(raw), group=object())  # no worker is asked for anything
    assert REFUSED[change] in str(refused.value)


@pytest.mark.parametrize("form", ["{run}/first", "{run}/{step}", "{run}/{step}/adapter"])
def test_a_start_that_fits_passes(raw, earlier, dry_run, form):
    (step,) = earlier.results().steps
    earlier.write_json(f"{step.directory}/adapter/adapter_config.json", {"peft_type": "CURLORA"})
    called = dry_run(raw | {"start_from": form.format(run=earlier.uri, step=step.directory)})
    assert called.exit_code == 0, called.output


def test_start_from_is_checked_even_where_the_data_is_bad(raw, earlier, dry_run):
    tasks = [raw["tasks"][0], raw["tasks"][1] | {"text": "sentense"}]
    called = dry_run(raw | {"start_from": f"{earlier.uri}/ghost", "tasks": tasks})
    assert called.exit_code == 2
    assert "has no finished step 'ghost'" in called.output and "did you mean 'sentence'" in called.output
