"""Two real processes under ZeRO-2 and ZeRO-3 train, under every strategy, what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
WORKER = Path(__file__).with_name("strategies_zero_worker.py")
NAMES = (
    "replay",
    "replay of classes",
    "lwf of classes",
    "rehearsal",
    "rehearsal of classes",
    "ilora",
    "coma",
    "ewc",
    "clora",
    "olora",
)


def run(stage, processes, base, out):
    out.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    command = [*launcher, str(WORKER), str(stage), str(base), str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(path / "base")
    return {
        "one": run(2, 1, path / "base", path / "one"),
        "zero2": run(2, 2, path / "base", path / "zero2"),
        "zero3": run(3, 2, path / "base", path / "zero3"),
    }


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_what_one_process_trains(runs, stage, name):
    one, first, second = runs["one"][0][name], runs[stage][0][name], runs[stage][1][name]
    assert first == second, "ranks agree, to the bit"
    for part in ("trained", "state"):
        assert first[part].keys() == one[part].keys()
        for key, values in one[part].items():
            # weights have the size of the learning rate; Fisher information is tiny
            weights = part == "trained" or key.startswith(("slow.", "fast.", "anchor."))
            assert values == pytest.approx(first[part][key], rel=2e-3, abs=2e-4 if weights else 1e-7)


OTHER = {"clora": "olora", "olora": "clora", "lwf of classes": "sequential of classes"}


@pytest.mark.parametrize("name", ["ilora", "coma", "lwf of classes", "ewc", "clora", "olora"])
def test_a_penalty_changes_what_is_trained(runs, name):
    trained = {kind: runs["one"][0][kind]["trained"] for kind in runs["one"][0]}
    other = OTHER.get(name, "replay")
    difference = max(
        abs(a - b) for key in trained[name] for a, b in zip(trained[name][key], trained[other][key], strict=True)
    )
    assert difference > 5e-3
