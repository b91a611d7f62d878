"""Trains and publishes one step on a worker."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pipelines.config.pipeline import PipelineConfig
from pipelines.data.kinds import kind_of
from pipelines.data.sources import digest_of, load_split
from pipelines.distributed.engine import writable
from pipelines.models import heads
from pipelines.training.trainer import ContinualTrainer


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def put_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Trainable weights of a checkpoint into a model that has no engine yet."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        with writable(parameters[name]):
            parameters[name].data.copy_(tensor)


def training_data_identity(config: PipelineConfig, name: str) -> dict:
    task = config.task(name)
    return {"train": {"digest": digest_of(task, "train"), "rows": len(load_split(task, "train"))}}


def class_names(config: PipelineConfig, names: Sequence[str]) -> dict[str, list[str]]:
    """Class names of the step's classifications: who uses the adapter elsewhere has no data to read them from."""
    classes = {name: kind_of(config.task(name)).classes(config.task(name)) for name in names}
    return {name: list(found) for name, found in classes.items() if found}


def end_engine(trainer: ContinualTrainer) -> None:
    """Give back what the engine holds; the model stays."""
    trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    trainer.model.zero_grad(set_to_none=True)


def count_head_parameters(model: nn.Module) -> int:
    return sum(
        getattr(p, "ds_numel", p.numel()) for head in heads.trainable_heads(model).values() for p in head.parameters()
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: this process's peak resident set, or the peak allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
