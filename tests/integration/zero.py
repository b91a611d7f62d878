"""Processes under torchrun, for what needs a DeepSpeed group and no Ray: a tiny base, a launch, reports by rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LAUNCHER = ("-m", "torch.distributed.run", "--standalone")


def tiny_base(folder: Path, layers: int = 1, random_biases: bool = False) -> Path:
    """An untrained Llama over 64 tokens, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=64, attention_bias=random_biases)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def launch(worker: str, processes: int, what: str, base: Path, out: Path, torchrun: bool = True) -> list[dict]:
    """`rank<k>.json` of every process of `worker WHAT BASE OUT`; a file beside this one."""
    out.mkdir()
    launcher = [*LAUNCHER, f"--nproc_per_node={processes}"] if torchrun else []
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
    command = [sys.executable, *launcher, str(here / worker), what, str(base), str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]
