"""A trial that is scored in the middle trains the same bits as one that is not: its adapter can be taken over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
WORKER = Path(__file__).with_name("search_zero_worker.py")


@pytest.mark.parametrize("stage", [2, 3])
def test_scores_at_rungs_leave_no_trace_in_what_is_trained(tmp_path, stage):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        tmp_path / "base"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    command = [*launcher, str(WORKER), str(stage), str(tmp_path / "base"), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        (plain, none), (scored, scores) = rank["plain"], rank["scored"]
        assert none == []
        assert len(scores) == 2 and scores[0] != scores[1]
        assert scored == plain
    assert ranks[0]["scored"] == ranks[1]["scored"]
