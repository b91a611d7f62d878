"""Chains over a base that bitsandbytes has quantised: trained, scored, predicted with, exported, loaded alone."""

import peft
import pytest
import torch
import transformers

import curlora  # noqa: F401  (registers its adapter type)
from pipelines.config.sections import BaseModelConfig
from pipelines.inference.export import export_step
from pipelines.inference.predict import load_trained
from pipelines.models.base import load_base
from pipelines.runs.directory import RunDirectory

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
CASES = {  # adapter, strategy, workers
    "4bit": ({"type": "curlora", "r": 8}, {"name": "ilora", "size": 4, "decay": 0.5}, 2),
    "8bit": ({"type": "lora", "r": 4, "alpha": 8}, {"name": "sequential"}, 1),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def chain(bench, request) -> tuple[str, dict, RunDirectory]:
    adapter, strategy, workers = CASES[request.param]
    changes = {
        "base_model": bench.raw["base_model"] | {"quantization": request.param},
        "training": bench.raw["training"] | {"max_steps": 12},
        "evaluation": {"max_examples": 48},
        "tasks": bench.raw["tasks"][1:],
        "adapter": adapter,
        "strategy": strategy,
    }
    results = bench.run_warm(bench.config(request.param, **changes), f"resources.workers={workers}")
    return request.param, results, RunDirectory(str(bench.root / "runs" / results["run"]))


def last_logits(model, test: dict) -> list[float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([test["input_ids"]])).logits[0, -1]
    return logits[: len(test["last_logits"])].tolist()


def test_it_learns_and_keeps_the_base_quantised(bench, chain):
    bits, results, run = chain
    assert results["status"] == "finished"
    curve = [loss for _, loss, *_ in bench.metrics(results, 1)["training"]["curve"]]
    assert sum(curve[-4:]) < sum(curve[:4])
    model = load_trained(run, "text").model
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits] in kinds


def test_an_adapter_loads_alone_on_the_quantised_base_and_merges_into_the_whole_one(bench, chain, tmp_path):
    bits, results, run = chain
    test = bench.metrics(results, 1)["self_test"]
    base = load_base(BaseModelConfig(path=bench.raw["base_model"]["path"], dtype="float32", quantization=bits))
    folder = run.download(results["steps"][1]["directory"], tmp_path / "step")
    alone = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert last_logits(alone, test) == pytest.approx(test["last_logits"], abs=1e-5)
    merged = export_step(run, "text", "merged", tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert not getattr(whole, "is_quantized", False)
    # 8 bit layers round what goes into them, too
    assert last_logits(whole, test) == pytest.approx(test["last_logits"], abs={"4bit": 1e-4, "8bit": 0.2}[bits])
    plain = transformers.AutoModelForCausalLM.from_pretrained(bench.raw["base_model"]["path"], dtype=torch.float32)
    assert last_logits(plain, test) != pytest.approx(test["last_logits"], abs=0.2)


def test_heads_alone_train_on_a_quantised_base(bench):
    base = bench.raw["base_model"] | {"quantization": "4bit"}
    changes = {
        "adapter": {"type": "none"},
        "tasks": bench.raw["tasks"][:1],
        "training": {"max_steps": 4, "max_length": 48},
    }
    results = bench.run_warm(bench.config("quantised-probe", base_model=base, **changes), "resources.workers=1")
    assert bench.metrics(results, 0)["training"]["steps"] == 4
