"""Chains over bases that are not Llamas, under ZeRO-2 and ZeRO-3 with two workers: trained, scored, predicted with,
exported, and loaded by stock PEFT."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.bench import Bench
from tests.conftest import write_jsonl, write_reviews
from tests.families import FAMILIES, FUSED, with_listed_experts, write

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
LISTED = "listed-experts"
STAGES = ("zero2", "zero3")
STOCK = """
import json, sys, peft, torch, transformers
found = []
for base, adapter, ids in json.load(sys.stdin):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=True)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        found.append(model(input_ids=torch.tensor([ids])).logits[0, -1].tolist())
assert not {"curlora", "pipelines"} & set(sys.modules)
print(json.dumps(found))
"""


class Chains:
    """Runs each chain once, when it is first asked for, on workers that stay warm."""

    def __init__(self, root, tokenizer, warm):
        self.bases = {family: write(family, tokenizer, root / family) for family in FAMILIES}
        self.bases[LISTED] = with_listed_experts(tokenizer, root / LISTED)
        data = write_reviews(root / "reviews")
        (root / "talk").mkdir()
        write_jsonl(root / "talk" / "test.jsonl", [{"text": "a slow joke and a dull plot"}] * 6)
        first = {"name": "mood", "kind": "classification", "data": str(data), "text": "sentence"}
        raw = {
            "adapter": {"type": "curlora", "r": 4},
            # a worker sees one sequence at a time, which cannot reach all experts of a mixture
            "training": {"max_steps": 6, "batch_size": 2, "max_length": 12, "learning_rate": 1e-2},
            "resources": {"workers": 2},
            "tasks": [first, first | {"name": "said", "head": "verbalizer", "prompt": "{sentence} label"}],
            "retention": [{"name": "talk", "data": str(root / "talk"), "window": 12}],
            "tracking": None,
            "storage": str(root / "runs"),
        }
        self.bench = Bench(root, raw, warm)
        self.events: dict[str, list] = {}
        self._results: dict[str, dict] = {}

    def config(self, family: str, stage: str, name: str, workers: int = 2):
        base = {"path": str(self.bases[family]), "dtype": "float32", "trust_remote_code": family == LISTED}
        return self.bench.config(name, base_model=base, deepspeed=stage, resources={"workers": workers})

    def results(self, family: str, stage: str, workers: int = 2) -> dict:
        name = f"{family}-{stage}-{workers}"
        if name not in self._results:
            events = self.events[name] = []
            config = self.config(family, stage, name, workers)
            self._results[name] = self.bench.run_warm(config, on_event=events.append)
        return self._results[name]

    def said_of_experts(self, family: str, stage: str) -> list[str]:
        """Warnings of a run of two workers that are about experts."""
        self.results(family, stage)
        events = self.events[f"{family}-{stage}-2"]
        return [event.text for event in events if event.kind == "warning" and "experts" in event.text]

    def adapter(self, results: dict, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.bench.step(results, step) / "adapter" / "adapter_model.safetensors")

    def trained(self, results: dict, step: int) -> torch.Tensor:
        """All U of the adapter as one vector."""
        adapter = self.adapter(results, step)
        return torch.cat([adapter[name].flatten() for name in sorted(adapter) if name.endswith(".U")])


@pytest.fixture(scope="module")
def chains(tmp_path_factory, tokenizer, warm_workers) -> Chains:
    return Chains(tmp_path_factory.mktemp("families"), tokenizer, warm_workers)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", [*FAMILIES, LISTED])
def test_a_chain_of_two_tasks_trains_and_scores(chains, family, stage):
    results = chains.results(family, stage)
    assert results["status"] == "finished"
    assert None not in results["scores"][-1]
    first, second = (chains.trained(results, step) for step in (0, 1))
    assert first.abs().max() > 1e-3
    assert (second - first).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, LISTED])
def test_one_worker_and_two_under_either_stage_train_the_same(chains, family):
    one = chains.results(family, "zero2", workers=1)
    for stage in STAGES:
        two = chains.results(family, stage)
        for step in (0, 1):
            expected = chains.trained(one, step)
            assert (chains.trained(two, step) - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", [*FAMILIES, LISTED])
def test_predictions_are_those_of_the_run(chains, family, tmp_path):
    results, bench = chains.results(family, "zero3"), chains.bench
    for task, step in (("mood", 0), ("said", 1)):
        lines = (bench.step(results, step) / "predictions" / f"{task}.jsonl").read_text().splitlines()
        rows = (bench.root / "reviews" / "test.jsonl").read_text().splitlines()
        write_jsonl(tmp_path / "rows.jsonl", [{"sentence": json.loads(row)["sentence"]} for row in rows])
        options = ("--task", task, "--step", task, "--json", "--file", str(tmp_path / "rows.jsonl"))
        found = bench.command("predict", str(bench.directory(results["run"])), *options).splitlines()
        expected = [json.loads(line)["prediction"] for line in lines]
        assert [json.loads(line)["prediction"] for line in found] == expected


def test_exported_adapters_compute_in_stock_peft_what_the_workers_computed(chains, tmp_path):
    given, expected = [], []
    for family in [*FAMILIES, LISTED]:
        results = chains.results(family, "zero3")
        target = tmp_path / family
        run = str(chains.bench.directory(results["run"]))
        chains.bench.command("export", run, "--as", "lora", "--to", str(target))
        test = chains.bench.metrics(results, 1)["self_test"]
        given.append((str(chains.bases[family]), str(target), test["input_ids"]))
        expected.append(test["last_logits"])
    done = subprocess.run([sys.executable, "-c", STOCK], input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family, found, wanted in zip([*FAMILIES, LISTED], json.loads(done.stdout), expected, strict=True):
        assert found[: len(wanted)] == pytest.approx(wanted, abs=1e-5), family


def test_experts_that_no_adapter_reaches_are_named_once_in_a_run_and_before_it(chains):
    for family in FUSED:
        (said,) = chains.said_of_experts(family, "zero3")
        assert "model.layers.*.mlp.experts.gate_up_proj" in said and "model.layers.*.mlp.experts.down_proj" in said
        config = chains.config(family, "zero3", f"{family}-dry")
        before = json.loads(chains.bench.command("run", str(config), "--dry-run", "--json"))
        assert said in before["warnings"]
    for family in ("qwen3", LISTED):
        assert chains.said_of_experts(family, "zero3") == []


@pytest.mark.parametrize(("family", "stage"), [("qwen3-moe", "zero3"), ("gpt2", "zero2"), ("falcon", "zero3")])
def test_the_command_line_gives_the_same_chain(chains, family, stage):
    warm = chains.results(family, stage)
    cold = chains.bench.run(chains.config(family, stage, f"{family}-alone"))
    assert cold["scores"] == warm["scores"]
    assert torch.equal(chains.trained(cold, 1), chains.trained(warm, 1))
