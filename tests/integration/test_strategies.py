"""Strategies and stacks in the real chain: every kind of task, other worker counts, an adapter that loads alone."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

import curlora  # noqa: F401  (registers its adapter type)

CASES = {
    "ilora": ({"type": "curlora", "r": 8}, {"name": "ilora", "size": 4, "decay": 0.5}, "zero3"),
    "olora": ({"type": "lora", "r": 2, "alpha": 4, "carry": "stack"}, {"name": "olora"}, "zero2"),
    "ewc": ({"type": "curlora", "r": 8}, {"name": "ewc", "strength": 1e4, "examples": 6}, "zero3"),
}


def run(bench, name: str, workers: int) -> dict:
    adapter, strategy, stage = CASES[name]
    training = bench.raw["training"] | {"max_steps": 4, "gradient_accumulation": 2}
    evaluation = {"max_examples": 48}
    changes = {"adapter": adapter, "strategy": strategy, "training": training, "evaluation": evaluation}
    config = bench.config(f"{name}-{workers}", **changes, deepspeed=stage if workers > 1 else "zero2")
    return bench.run(config, "--set", f"resources.workers={workers}")


@pytest.fixture(scope="module")
def two_workers(bench):
    return {name: run(bench, name, 2) for name in CASES}


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_step_loads_in_a_bare_process_and_earlier_tasks_are_scored(bench, two_workers, name):
    results = two_workers[name]
    assert results["status"] == "finished"
    assert None not in results["scores"][-1]
    base = transformers.AutoModelForCausalLM.from_pretrained(bench.raw["base_model"]["path"], dtype=torch.float32)
    for step in range(3):
        folder = bench.root / "runs" / results["run"] / results["steps"][step]["directory"]
        test = bench.metrics(results, step)["self_test"]
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "adapter")).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([test["input_ids"]])).logits[0, -1]
        assert logits[: len(test["last_logits"])].tolist() == pytest.approx(test["last_logits"], abs=1e-5)


def test_a_stack_grows_by_a_block_a_task_and_trains_one(bench, two_workers):
    results = two_workers["olora"]
    assert len({bench.metrics(results, step)["trainable_parameters"] for step in range(3)}) == 1
    ranks = [adapter_config(bench, results, step)["r"] for step in range(3)]
    assert ranks == [2, 4, 6]


def adapter_config(bench, results: dict, step: int) -> dict:
    folder: Path = bench.root / "runs" / results["run"] / results["steps"][step]["directory"] / "adapter"
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", ["ilora", "olora"])
def test_scores_do_not_depend_on_the_number_of_workers(bench, two_workers, name):
    one = run(bench, name, 1)
    for found, wanted in zip(one["scores"], two_workers[name]["scores"], strict=True):
        for task, score, expected in zip(one["tasks"], found, wanted, strict=True):
            assert (score is None) == (expected is None)
            if score is not None:
                bound = 1e-3 if one["metric"][task] == "nll" else 2 / 48 + 1e-9
                assert abs(score - expected) <= bound
