"""Checkpoints in the middle of a step: one safetensors file and one JSON, below `train/<fp8>/` of the run.

They hold whole tensors by parameter name, so they fit any number of workers and any ZeRO stage, and they are
kilobytes, because what trains is. The JSON is written last and carries the digest of the tensors: a checkpoint that
was cut off is never used, the one before it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass

import torch
from safetensors import torch as safetensors

from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import StepPlan

KEEP = 2  # newest ones: the last may be cut off


@dataclass(frozen=True)
class Checkpoint:
    """A step after `step` optimizer steps.

    Attributes:
        tensors: `weight/<parameter>`, `exp_avg/…`, `exp_avg_sq/…` (full, fp32), `rng/<rank>`, `strategy/<name>`.
        values: JSON beside them: `micro_batches` seen, `tokens`, `seconds` and `curve` so far, `scheduler_step`,
            `loss_scale`, `world_size`, `strategy`.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    values: dict

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix/`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}


def save(run: RunDirectory, plan: StepPlan, checkpoint: Checkpoint) -> int:
    """Write a checkpoint and forget the oldest; returns its bytes."""
    name = f"{plan.checkpoints}/{checkpoint.step:08d}"
    data = safetensors.save({key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()})
    values = {
        "fingerprint": plan.fingerprint,
        "step": checkpoint.step,
        "sha256": hashlib.sha256(data).hexdigest(),
        "time": time.time(),
        **checkpoint.values,
    }
    run.write_bytes(f"{name}.safetensors", data)
    text = json.dumps(values, allow_nan=False).encode()
    run.write_bytes(f"{name}.json", text)
    for step in steps_of(run, plan)[:-KEEP]:
        for ending in ("json", "safetensors"):
            run.remove(f"{plan.checkpoints}/{step:08d}.{ending}")
    return len(data) + len(text)


def steps_of(run: RunDirectory, plan: StepPlan) -> list[int]:
    """Optimizer steps at which there are checkpoints (perhaps bad ones), ascending."""
    names = run.list(plan.checkpoints)
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def load(run: RunDirectory, plan: StepPlan, step: int) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        ValueError: it is cut off, damaged, or of another step of the chain.
    """
    name = f"{plan.checkpoints}/{step:08d}"
    try:
        values = json.loads(run.read_bytes(f"{name}.json"))
        data = run.read_bytes(f"{name}.safetensors")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"checkpoint {name} cannot be read ({error})") from error
    if values.get("fingerprint") != plan.fingerprint:
        raise ValueError(f"checkpoint {name} belongs to another step")
    if hashlib.sha256(data).hexdigest() != values.get("sha256"):
        raise ValueError(f"checkpoint {name} is damaged: its tensors are not those that were written")
    return Checkpoint(step, safetensors.load(data), values)


def newest(run: RunDirectory, plan: StepPlan) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a step, and what was wrong with newer ones."""
    damaged = []
    for step in reversed(steps_of(run, plan)):
        try:
            return load(run, plan, step), damaged
        except ValueError as error:
            damaged.append(str(error))
    return None, damaged
