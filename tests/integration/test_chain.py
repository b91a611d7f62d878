"""The chain on real Ray, real DeepSpeed, a real model and real text."""

import html
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.inference.export import export_step
from pipelines.runs.directory import RunDirectory
from tests.bench import answered_alone, wait_for

TEXT_LEARNING = 0.005  # nats a token in 24 steps of a model of 30 thousand parameters


def test_results_follow_from_their_own_matrix(reference):
    assert reference["status"] == "finished"
    assert (reference["tasks"], list(reference["metric"].values())) == (
        ["part", "word", "text"],
        ["accuracy", "accuracy", "nll"],
    )
    base, first, second, last = reference["scores"]
    nulls = [[cell is None for cell in row] for row in reference["scores"]]
    assert nulls == [[True, False, False], [False, False, True], [False] * 3, [False] * 3]
    part, word, text = range(3)
    lost = [max(first[part], second[part]) - last[part], second[word] - last[word]]
    by_hand = {
        "average_accuracy": (last[part] + last[word]) / 2,
        "learning_accuracy": (first[part] + second[word]) / 2,
        "backward_transfer": (last[part] - first[part] + last[word] - second[word]) / 2,
        "forward_transfer": first[word] - base[word],
        "forgetting": sum(lost) / 2,
        "nll_average": last[text],
        "nll_learning": base[text] - last[text],
        "perplexity_ratio": math.exp(reference["nll"]["other"][3] - reference["nll"]["other"][0]),
    }
    assert {key: reference[key] for key in by_hand} == pytest.approx(by_hand)
    assert reference["nll_backward_transfer"] is None  # nothing came after the text
    assert reference["trainable_parameters"] == 14 * 8 * 8
    assert reference["seconds"]["total"] >= reference["seconds"]["train"] + reference["seconds"]["evaluate"]


def test_scores_are_those_of_the_published_predictions(bench, reference):
    for task, column in (("part", 0), ("word", 1)):
        outcomes = predictions(bench, reference, 2, task)
        right = sum(outcome["prediction"] == outcome["label"] for outcome in outcomes)
        assert reference["scores"][3][column] == pytest.approx(right / len(outcomes))
    outcomes = predictions(bench, reference, 2, "text")
    nll = math.fsum(outcome["nll"] for outcome in outcomes) / sum(outcome["tokens"] for outcome in outcomes)
    assert reference["scores"][3][2] == pytest.approx(nll)


def predictions(bench, results: dict, step: int, name: str) -> list[dict]:
    lines = (bench.step(results, step) / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_text_task_is_learned(reference):
    assert reference["nll_learning"] > TEXT_LEARNING


def test_doing_it_again_does_nothing(bench, reference):
    before = bench.metrics(reference, 0)
    again = json.loads(bench.command("run", "reference.yaml", "--json"))
    assert again["ran"] is False
    assert again["scores"] == reference["scores"]
    assert bench.metrics(again, 0) == before
    assert [s["mlflow_run_id"] for s in again["steps"]] == [s["mlflow_run_id"] for s in reference["steps"]]


def test_lineage_has_a_child_for_every_task(bench, reference):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{bench.root}/mlflow.db")
    experiment = client.get_experiment_by_name("integration")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = {run.info.run_id for run in runs} - {parents[0].info.run_id}
    assert children == {step["mlflow_run_id"] for step in reference["steps"]}
    assert client.list_artifacts(parents[0].info.run_id)


def test_report_is_written(bench, reference):
    page = (bench.root / "runs" / "reference" / "report.html").read_text()
    assert all(task in page for task in reference["tasks"])


def test_base_and_every_step_answer_the_same_prompts(bench, reference):
    rows = bench.samples(reference)
    assert [[sample["task"] for sample in row] for row in rows] == [
        [None, "word", "text"],  # no head is trained yet
        *([[None, "part", "word", "text"]] * 3),
    ]
    last = {sample["task"]: sample for sample in rows[3]}
    names = json.loads((Path(bench.raw["tasks"][0]["data"]) / "labels.json").read_text())
    assert {last["part"]["answer"], last["word"]["answer"]} <= set(names)
    assert last["word"]["generated"]
    assert "generated" not in last["part"]
    assert len({row[0]["answer"] for row in rows}) > 1  # what it says has changed
    for row, step in zip(rows, ("base", *reference["tasks"]), strict=True):
        assert row == answered_alone(bench.directory("reference"), step)


def test_answers_are_on_the_page_and_in_mlflow(bench, reference):
    import mlflow

    rows = bench.samples(reference)
    page = (bench.directory("reference") / "report.html").read_text()
    assert "<h2>What it says</h2>" in page
    assert html.escape(rows[3][0]["prompt"]) in page
    client = mlflow.MlflowClient(f"sqlite:///{bench.root}/mlflow.db")
    child = client.get_run(reference["steps"][1]["mlflow_run_id"])
    parent = child.data.tags["mlflow.parentRunId"]
    folders = [client.get_run(run_id).info.artifact_uri for run_id in (child.info.run_id, parent)]
    found = [json.loads(mlflow.artifacts.load_text(f"{folder}/samples.json")) for folder in folders]
    assert [row[3] for row in found[0]["data"]] == [sample["answer"] for sample in rows[2]]
    assert found[1]["columns"] == ["task", "prompt", "0 base", "1 part", "2 word", "3 text", "reference"]
    general = next(row for row in found[1]["data"] if row[0] is None)
    assert general[2:6] == [row[0]["answer"] for row in rows]


def test_the_adapter_gives_the_workers_logits_in_a_bare_process(bench, reference):
    step = bench.root / "runs" / "reference" / reference["steps"][-1]["directory"]
    code = (
        "import json, sys, torch, curlora, peft, transformers\n"
        "base, step = sys.argv[1:]\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)\n"
        "model = peft.PeftModel.from_pretrained(model, step + '/adapter').eval()\n"
        "test = json.load(open(step + '/metrics.json'))['self_test']\n"
        "with torch.no_grad(): logits = model(input_ids=torch.tensor([test['input_ids']])).logits[0, -1]\n"
        "wanted = torch.tensor(test['last_logits'])\n"
        "with model.disable_adapter(), torch.no_grad():\n"
        "    bare = model(input_ids=torch.tensor([test['input_ids']])).logits[0, -1]\n"
        "print((logits[:len(wanted)] - wanted).abs().max().item(), (bare[:len(wanted)] - wanted).abs().max().item())\n"
        "assert not {'ray', 'mlflow', 'deepspeed'} & set(sys.modules), 'more than curlora and peft was needed'\n"
    )
    base = bench.raw["base_model"]["path"]
    out = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code, base, str(step)], text=True)
    with_adapter, without = map(float, out.split())
    assert with_adapter <= 1e-5
    assert without > 1e-3  # the adapter does something, so the agreement says something


def curve(bench, results: dict, step: int) -> list[float]:
    return [loss for _, loss, _, _ in bench.metrics(results, step)["training"]["curve"]]


@pytest.mark.parametrize(
    ("name", "override"),
    [("zero3", "deepspeed=zero3"), ("alone", "resources.workers=1")],
)
def test_losses_and_scores_do_not_depend_on_stage_or_workers(bench, reference, name, override):
    other = bench.run_warm(bench.config(name), override)
    for step in range(3):
        assert curve(bench, other, step)[:20] == pytest.approx(curve(bench, reference, step)[:20], rel=1e-4)
    for row, wanted in zip(other["scores"], reference["scores"], strict=True):
        for task, score, expected in zip(reference["tasks"], row, wanted, strict=True):
            assert (score is None) == (expected is None)
            if score is not None:
                bound = 0.01 if reference["metric"][task] == "nll" else 2 * (0.25 / 64) ** 0.5
                assert abs(score - expected) <= bound
    assert bench.samples(other)[0] == bench.samples(reference)[0]  # texts of the same base
    environment = bench.metrics(other, 0)["environment"]
    whole, held = environment["base_numbers"], environment["base_numbers_held"]
    assert held == whole if name == "alone" else held <= 0.51 * whole


def test_one_segment_a_step_gives_the_same_bits(bench, reference):
    other = bench.run_warm(bench.config("segments"), segment_length=1)
    assert other["scores"] == reference["scores"]
    for step in range(3):
        assert bench.adapter_bytes(other, step) == bench.adapter_bytes(reference, step)
    assert bench.samples(other) == bench.samples(reference)


def test_killed_driver_goes_on_from_the_last_finished_step(bench, reference):
    config = bench.config("killed")
    process = bench.start(config)
    first = bench.root / "runs" / "killed" / reference["steps"][0]["directory"] / "metrics.json"
    wait_for(first.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = first.read_bytes()
    results = bench.run_warm(config)
    assert first.read_bytes() == before
    assert results["scores"] == reference["scores"]
    assert bench.adapter_bytes(results, 2) == bench.adapter_bytes(reference, 2)
    assert bench.samples(results) == bench.samples(reference)


def test_prompts_added_later_are_answered_without_training(bench, reference):
    shutil.copytree(bench.directory("reference"), bench.directory("asked"))
    before, answered = [bench.metrics(reference, step) for step in range(3)], bench.samples(reference)
    samples = {"prompts": ["This function returns", "The documentation"], "max_new_tokens": 8, "per_task": 2}
    results = bench.run_warm(bench.config("asked", evaluation={"samples": samples}))
    assert results["ran"] is True
    assert results["scores"] == reference["scores"]
    for step, old in enumerate(before):
        new = bench.metrics(results, step)
        assert {name: value for name, value in new.items() if name not in ("samples", "seconds", "finished")} == {
            name: value for name, value in old.items() if name not in ("samples", "seconds", "finished")
        }
    for row, old, step in zip(bench.samples(results), answered, ("base", *reference["tasks"]), strict=True):
        assert row[: len(old)] == old  # not asked again
        alone = {sample["key"]: sample for sample in answered_alone(bench.directory("asked"), step)}
        assert alone == {sample["key"]: sample for sample in row}
        assert len(row) == 2 * len(old)
    again = bench.run_warm(bench.config("asked", evaluation={"samples": samples}))
    assert again["ran"] is False


def test_a_corpus_added_later_costs_only_its_cells(bench, reference):
    extra = bench.raw["retention"] + [bench.raw["retention"][0] | {"name": "again", "window": 32}]
    store = {"uri": f"sqlite:///{bench.root}/mlflow.db", "experiment": "integration"}
    results = bench.run_warm(bench.config("reference", retention=extra, tracking=store))
    assert [s["fingerprint"] for s in results["steps"]] == [s["fingerprint"] for s in reference["steps"]]
    assert len(results["perplexity"]["again"]) == 4
    assert None not in results["perplexity"]["again"]
    assert results["scores"] == reference["scores"]


def test_more_workers_than_the_cluster_has_is_refused(bench):
    many = (os.cpu_count() or 1) + 1
    err = bench.run(bench.config("crowd"), "--set", f"resources.workers={many}", code=2, timeout=120)
    assert f"{many} workers need {many} CPU" in err


def test_divergence_stops_with_the_step_and_keeps_what_was_finished(bench):
    training = bench.raw["training"] | {"learning_rate": 100.0, "weight_decay": 100.0}
    err = bench.run(bench.config("diverged", training=training), code=1)
    assert "the loss is not finite at optimizer step" in err
    status = json.loads((bench.root / "runs" / "diverged" / "results.json").read_text())
    assert status["status"] == "failed"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("probe", {"adapter": {"type": "none"}}),
        ("joint", {"strategy": {"name": "joint"}}),
        ("lora", {"adapter": {"type": "lora", "r": 4, "alpha": 8}}),
    ],
)
def test_other_methods_run_in_the_same_chain(bench, name, changes):
    results = bench.run_warm(bench.config(name, **changes), "training.max_steps=4")
    assert results["status"] == "finished"
    assert len(results["scores"]) == (2 if name == "joint" else 4)
    assert None not in results["scores"][-1]
    if name == "probe":
        assert results["trainable_parameters"] == 0
        assert results["adapter_bytes"] == 0
        assert results["perplexity_ratio"] == 1.0  # heads do not touch the language model


def test_exported_steps_give_the_workers_logits_without_curlora(bench, reference, tmp_path):
    step = bench.metrics(reference, 2)["self_test"]
    bench.command("export", "reference", "--as", "lora", "--to", str(tmp_path / "lora"), "--step", "text")
    export_step(RunDirectory(str(bench.directory("reference"))), None, "merged", tmp_path / "merged")
    code = (
        "import json, sys, torch, peft, transformers\n"
        "sys.modules['curlora'] = None  # any import of it fails\n"
        "base, lora, merged, ids = sys.argv[1:]\n"
        "def load(path): return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)\n"
        "models = {'lora': peft.PeftModel.from_pretrained(load(base), lora), 'merged': load(merged)}\n"
        "ids = torch.tensor([json.loads(ids)])\n"
        "with torch.no_grad():\n"
        "    print(json.dumps({form: model.eval()(ids).logits[0, -1].tolist() for form, model in models.items()}))\n"
    )
    folders = [bench.raw["base_model"]["path"], str(tmp_path / "lora"), str(tmp_path / "merged")]
    command = [sys.executable, "-W", "ignore", "-c", code, *folders, json.dumps(step["input_ids"])]
    for logits in json.loads(subprocess.check_output(command, text=True)).values():
        assert logits[: len(step["last_logits"])] == pytest.approx(step["last_logits"], abs=1e-4)


def test_the_line_between_two_steps_ends_at_their_own_scores(bench, reference):
    from pipelines.inference.connectivity import write

    found = write(RunDirectory(str(bench.directory("reference"))), points=3)
    tasks, scores = reference["tasks"], reference["scores"]
    assert [(line["from"], line["to"]) for line in found] == [(tasks[0], tasks[1]), (tasks[1], tasks[2])]
    last = found[-1]["loss"]
    assert last["text"][-1] == pytest.approx(scores[3][2], rel=1e-4)
    assert last["text"][0] == pytest.approx(scores[2][2], rel=1e-4)
    assert 1 - last["word"][0] == pytest.approx(scores[2][1])
    assert last["other"][-1] == pytest.approx(reference["nll"]["other"][3], rel=1e-4)
    assert len(set(last["text"])) == 3
    assert (bench.directory("reference") / "figures" / "connectivity.png").exists()
