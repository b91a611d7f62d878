"""Checkpoints in the middle of a step: whole, of the right step, and the one before where the last is cut off."""

import dataclasses

import pytest
import torch

from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint

PLAN = StepPlan(1, ("a",), "f" * 32, "b" * 32)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def taken(step: int) -> Checkpoint:
    tensors = {
        "weight/u": torch.full((2, 3), float(step)),
        "strategy/memory": torch.arange(4),
        "rng/0": torch.zeros(3),
    }
    return Checkpoint(step, tensors, {"micro_batches": 2 * step, "strategy": {"seen": step}})


def test_a_checkpoint_comes_back_as_it_was(run):
    size = checkpoint.save(run, PLAN, taken(3))
    back, damaged = checkpoint.newest(run, PLAN)
    assert not damaged
    assert back.step == 3
    assert back.values["micro_batches"] == 6
    assert back.values["strategy"] == {"seen": 3}
    assert torch.equal(back.part("weight")["u"], torch.full((2, 3), 3.0))
    assert back.part("strategy")["memory"].dtype == torch.int64
    assert size < 4096


def test_only_the_newest_two_are_kept(run):
    for step in (1, 5, 9, 12):
        checkpoint.save(run, PLAN, taken(step))
    assert checkpoint.steps_of(run, PLAN) == [9, 12]
    assert len(run.list(PLAN.checkpoints)) == 4


@pytest.mark.parametrize("ending", ["safetensors", "json"])
@pytest.mark.parametrize("cut", [0, 1, 100])
def test_of_a_truncated_checkpoint_the_one_before_is_used(run, ending, cut):
    checkpoint.save(run, PLAN, taken(4))
    checkpoint.save(run, PLAN, taken(8))
    name = f"{PLAN.checkpoints}/00000008.{ending}"
    run.write_bytes(name, run.read_bytes(name)[:cut])
    found, damaged = checkpoint.newest(run, PLAN)
    assert found.step == 4
    assert "00000008" in damaged[0]


def test_tensors_without_their_json_are_no_checkpoint(run):
    checkpoint.save(run, PLAN, taken(4))
    run.remove(f"{PLAN.checkpoints}/00000004.json")
    assert checkpoint.newest(run, PLAN) == (None, [])


def test_a_checkpoint_of_another_step_is_refused(run):
    checkpoint.save(run, PLAN, taken(4))
    other = dataclasses.replace(PLAN, fingerprint="f" * 8 + "0" * 24)  # the same folder by chance
    found, damaged = checkpoint.newest(run, other)
    assert found is None
    assert "another step" in damaged[0]
