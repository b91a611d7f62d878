"""Checkpoints within a step: one safetensors file and one JSON file each, below `train/<fp8>/` of the run.

They hold unsharded tensors by parameter name, so that they can be resumed with any number of workers and any ZeRO
stage, and only what trains, so that they stay small. The JSON file is written last and holds the digest of the
tensors: a truncated checkpoint is never used; training then resumes from the one before it.
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

KEEP = 2  # the newest ones: the last may be truncated


@dataclass(frozen=True)
class Checkpoint:
    """The training state of a step after `step` optimizer steps.

    Attributes:
        tensors: `weight/<parameter>`, `exp_avg/…`, `exp_avg_sq/…` (full, fp32), `rng/<rank>`, `strategy/<name>`;
            with validation `best/<parameter>` and `best_strategy/<name>`, the best state so far.
        values: content of the JSON file: `micro_batches` seen, `tokens`, `seconds` and `curve` so far,
            `scheduler_step`, `loss_scale`, `world_size`, `strategy`, `validation`.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    values: dict

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix/`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}


def save(run: RunDirectory, plan: StepPlan, checkpoint: Checkpoint) -> int:
    """Write a checkpoint and delete all but the newest `KEEP`; returns its size in bytes."""
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
    """Optimizer steps that have a checkpoint, valid or not, ascending."""
    names = run.list(plan.checkpoints)
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def load(run: RunDirectory, plan: StepPlan, step: int) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        ValueError: it is truncated, damaged, or belongs to another step of the chain.
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
    """The newest valid checkpoint of a step, and what is wrong with newer ones."""
    damaged = []
    for step in reversed(steps_of(run, plan)):
        try:
            return load(run, plan, step), damaged
        except ValueError as error:
            damaged.append(str(error))
    return None, damaged
