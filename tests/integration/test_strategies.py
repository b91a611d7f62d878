"""Strategies and stacks in the real chain: every kind of task, other worker counts, an adapter that loads alone."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import curlora  # noqa: F401  (registers its adapter type)
from pipelines.data.sources import load_split
from pipelines.errors import ConfigError
from pipelines.inference.export import export_step
from pipelines.inference.predict import predict
from pipelines.runs.directory import RunDirectory

CASES = {  # adapter, strategy, DeepSpeed stage with two workers
    "ilora": ({"type": "curlora", "r": 8}, {"name": "ilora", "size": 4, "decay": 0.5}, "zero3"),
    "olora": ({"type": "lora", "r": 2, "alpha": 4, "carry": "stack"}, {"name": "olora"}, "zero3"),
    "replay": ({"type": "curlora", "r": 2, "carry": "stack"}, {"name": "replay", "share": 0.2}, "zero2"),
    "ewc": ({"type": "curlora", "r": 8}, {"name": "ewc", "strength": 1e4, "examples": 6}, "zero3"),
    "bank": ({"type": "curlora", "r": 8, "carry": "bank"}, {"name": "sequential"}, "zero3"),
}


def run(bench, name: str, workers: int) -> dict:
    adapter, strategy, stage = CASES[name]
    training = bench.raw["training"] | {"max_steps": 4, "gradient_accumulation": 2}
    evaluation = {"max_examples": 48}
    changes = {"adapter": adapter, "strategy": strategy, "training": training, "evaluation": evaluation}
    config = bench.config(f"{name}-{workers}", **changes, deepspeed=stage if workers > 1 else "zero2")
    return bench.run_warm(config, f"resources.workers={workers}")


@pytest.fixture(scope="module")
def two_workers(bench) -> dict[str, dict]:
    return {name: run(bench, name, 2) for name in CASES}


def last_logits(model, test: dict) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([test["input_ids"]])).logits[0, -1]
    return logits[: len(test["last_logits"])].tolist()


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_step_loads_in_a_bare_process_and_earlier_tasks_are_scored(bench, two_workers, name):
    results = two_workers[name]
    assert results["status"] == "finished"
    assert None not in results["scores"][-1]
    base = transformers.AutoModelForCausalLM.from_pretrained(bench.raw["base_model"]["path"], dtype=torch.float32)
    for step in range(3):
        folder = bench.root / "runs" / results["run"] / results["steps"][step]["directory"]
        test = bench.metrics(results, step)["self_test"]
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "adapter"))
        assert last_logits(model, test) == pytest.approx(test["last_logits"], abs=1e-5)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_head_stays_as_its_own_task_left_it(bench, two_workers, name):
    folder, steps = bench.root / "runs" / two_workers[name]["run"], two_workers[name]["steps"]
    after = [load_file(folder / step["directory"] / "heads.safetensors") for step in steps]
    own = {
        key: tensor
        for step, saved in zip(steps, after, strict=True)
        for key, tensor in saved.items()
        if key.rpartition(".")[0] == step["task"]
    }
    assert own, "a task of this sequence has a head"
    assert own.keys() == after[-1].keys()
    assert all(torch.equal(after[-1][key], tensor) for key, tensor in own.items())


def test_an_answer_of_a_bank_never_changes_while_its_route_does_not(bench, two_workers):
    results = two_workers["bank"]
    run_directory = RunDirectory(str(bench.root / "runs" / results["run"]))
    folders = [step["directory"] for step in results["steps"]]
    compared = 0
    for position, task in enumerate(results["tasks"]):
        rows = [run_directory.read_jsonl(f"{folder}/predictions/{task}.jsonl") for folder in folders[position:]]
        for first, *later in zip(*rows, strict=True):
            for outcome in later:
                if outcome["route"] == first["route"]:
                    compared += 1
                    assert outcome == first
    assert compared > 48
    last = run_directory.metrics(folders[-1])
    assert {cell.name for cell in last.cells if "routed_home" in cell.extras} == {cell.name for cell in last.cells}
    assert (
        last.files["bank/state.safetensors"].bytes
        > run_directory.metrics(folders[0]).files["bank/state.safetensors"].bytes
    )


def test_a_bank_predicts_with_the_adapter_of_the_task_that_is_named(bench, two_workers):
    run_directory = RunDirectory(str(bench.root / "runs" / two_workers["bank"]["run"]))
    first = next(t for t in run_directory.config().tasks if t.kind == "classification" and t.head == "classifier")
    rows = load_split(first, "test").to_list()[:12]
    own, last = (predict(run_directory, first.name, rows, step) for step in (first.name, None))
    assert own == last


def test_of_a_bank_one_named_task_leaves_at_a_time(bench, two_workers, tmp_path):
    results = two_workers["bank"]
    run_directory = RunDirectory(str(bench.root / "runs" / results["run"]))
    with pytest.raises(ConfigError, match=f"--step with one of: {results['tasks'][0]}"):
        export_step(run_directory, None, "lora", tmp_path / "none")
    target = export_step(run_directory, results["tasks"][0], "lora", tmp_path / "first")
    base = transformers.AutoModelForCausalLM.from_pretrained(bench.raw["base_model"]["path"], dtype=torch.float32)
    test = bench.metrics(results, 0)["self_test"]
    model = peft.PeftModel.from_pretrained(base, str(target))
    assert last_logits(model, test) == pytest.approx(test["last_logits"], abs=1e-4)


@pytest.mark.parametrize(("name", "field", "sizes"), [("olora", "r", [2, 4, 6]), ("replay", "blocks", [1, 2, 3])])
def test_a_stack_grows_by_a_block_a_task_and_trains_one(bench, two_workers, name, field, sizes):
    results = two_workers[name]
    assert len({bench.metrics(results, step)["trainable_parameters"] for step in range(3)}) == 1
    assert [adapter_config(bench, results, step)[field] for step in range(3)] == sizes


@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize("name", ["olora", "replay"])
def test_a_stack_leaves_as_an_ordinary_lora_or_merged(bench, two_workers, tmp_path, name, form):
    run_directory = RunDirectory(str(bench.root / "runs" / two_workers[name]["run"]))
    target = export_step(run_directory, None, form, tmp_path / form)
    path = bench.raw["base_model"]["path"] if form == "lora" else str(target)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(target)) if form == "lora" else model
    test = bench.metrics(two_workers[name], 2)["self_test"]
    assert last_logits(model, test) == pytest.approx(test["last_logits"], abs=1e-4)


def adapter_config(bench, results: dict, step: int) -> dict:
    folder: Path = bench.root / "runs" / results["run"] / results["steps"][step]["directory"] / "adapter"
    return json.loads((folder / "adapter_config.json").read_text())


def test_scores_do_not_depend_on_stage_or_number_of_workers(bench, two_workers):
    one = run(bench, "ilora", 1)
    for found, wanted in zip(one["scores"], two_workers["ilora"]["scores"], strict=True):
        for task, score, expected in zip(one["tasks"], found, wanted, strict=True):
            assert (score is None) == (expected is None)
            if score is not None:
                bound = 1e-3 if one["metric"][task] == "nll" else 2 / 48 + 1e-9
                assert abs(score - expected) <= bound
