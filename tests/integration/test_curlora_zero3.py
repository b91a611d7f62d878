"""Two real processes under DeepSpeed ZeRO-3 train what one process trains without DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
WORKER = Path(__file__).with_name("curlora_zero3_worker.py")


def run(stage, processes, base, out):
    out.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(WORKER), str(stage), str(base), str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero3")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # a bias is partitioned too, and z must subtract it
    model.save_pretrained(path / "base")
    return {"one": run(0, 1, path / "base", path / "one"), "two": run(3, 2, path / "base", path / "two"), "path": path}


def test_the_base_is_partitioned(runs):
    whole = runs["one"][0]["before"]
    for rank in runs["two"]:
        assert rank["before"] == 0, "from_pretrained leaves nothing but shards"
        assert 0.4 * whole < rank["local"] < 0.6 * whole


def test_both_ranks_agree_on_u_rows_and_columns(runs):
    first, second = runs["two"]
    assert first["layers"] == second["layers"]
    assert len(first["layers"]) == 14


def test_zero3_trains_what_one_process_trains(runs):
    one, two = runs["one"][0], runs["two"][0]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    assert one["losses"][0] != pytest.approx(one["losses"][-1], rel=1e-4)
    for name, layer in one["layers"].items():
        assert layer["rows"] == two["layers"][name]["rows"]
        assert layer["columns"] == two["layers"][name]["columns"]
        assert layer["U"] == pytest.approx(two["layers"][name]["U"], abs=1e-3)
        assert any(abs(value) > 1e-4 for value in layer["U"])


def test_the_norm_bound_holds_under_zero3_and_is_reached(runs):
    for rank in (*runs["one"], *runs["two"]):
        shares = [layer["share"] for layer in rank["layers"].values()]
        assert max(shares) <= rank["bound"] * (1 + 1e-5)
        assert max(shares) == pytest.approx(rank["bound"], rel=1e-3)


def test_the_saved_adapter_holds_whole_u(runs):
    one = load_file(runs["path"] / "one" / "adapter" / "adapter_model.safetensors")
    two = load_file(runs["path"] / "two" / "adapter" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.shape == two[key].shape
        if key.endswith(".U"):
            assert torch.allclose(tensor, two[key], atol=1e-3)
