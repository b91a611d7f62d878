"""Linear classifier heads, one per task, inside the model as `task_heads`, saved to `heads.safetensors`.

They are modules of the causal language model itself (below PEFT's wrapper), so DeepSpeed shards them like all
parameters, and PEFT, which saves only parameters with its prefix, ignores them. Parameter counts list them separately.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

ATTRIBUTE = "task_heads"


def causal_lm(model: nn.Module) -> nn.Module:
    """The language model below PEFT's wrappers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_heads(model: nn.Module, classes: Mapping[str, int], seed: int) -> nn.ModuleDict:
    """Add a head per task (name → number of classes) to the model, frozen until `train_heads`.

    Weights are drawn from N(0, 0.02²), seeded by (seed, task name): equal on all ranks and in all runs.
    """
    lm = causal_lm(model)
    hidden = lm.get_input_embeddings().embedding_dim
    device = next(lm.parameters()).device
    heads = nn.ModuleDict({_key(task): _head(task, hidden, n, seed) for task, n in classes.items()})
    heads.requires_grad_(False)
    setattr(lm, ATTRIBUTE, heads.to(device))
    return heads


def _head(task: str, hidden: int, classes: int, seed: int) -> nn.Linear:
    salt = hashlib.sha256(f"{seed}/{task}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(salt[:8], "big") >> 1)
    head = nn.Linear(hidden, classes)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.02, generator=generator)
        head.bias.zero_()
    return head


def detach_heads(model: nn.Module) -> None:
    lm = causal_lm(model)
    if hasattr(lm, ATTRIBUTE):
        delattr(lm, ATTRIBUTE)


def get_heads(model: nn.Module) -> nn.ModuleDict | None:
    return getattr(causal_lm(model), ATTRIBUTE, None)


def get_head(model: nn.Module, task: str) -> nn.Linear:
    return get_heads(model)[_key(task)]


def train_heads(model: nn.Module, tasks: tuple[str, ...]) -> None:
    """Make exactly the heads of `tasks` trainable."""
    for key, head in (get_heads(model) or {}).items():
        head.requires_grad_(key in {_key(task) for task in tasks})


def trainable_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Task name → head of the trainable heads, in a fixed order."""
    heads = get_heads(model) or {}
    return {key.removeprefix("task_"): head for key, head in sorted(heads.items()) if head.weight.requires_grad}


def heads_of(model: nn.Module, tasks: Iterable[str]) -> dict[str, nn.Linear]:
    """Task name → head of those `tasks` that have one, in a fixed order."""
    heads = get_heads(model) or {}
    return {task: heads[_key(task)] for task in sorted(tasks) if _key(task) in heads}


def load_heads(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved heads (`<task>.weight`, `<task>.bias`) into the attached ones; other heads stay unchanged.

    Raises:
        ValueError: a task has another number of classes than its saved head.
    """
    for name, tensor in tensors.items():
        task, _, part = name.rpartition(".")
        heads = get_heads(model)
        if _key(task) in heads:
            own = getattr(heads[_key(task)], part)
            if own.shape != tensor.shape:
                raise ValueError(
                    f"task '{task}' has {own.shape[0]} classes, its trained head {tensor.shape[0]}; "
                    "give the task with other classes another name"
                )
            own.data.copy_(tensor)


def saved_name(parameter_name: str) -> str | None:
    """`<task>.weight` for the parameter name of a head; None for any other."""
    marker = f"{ATTRIBUTE}.task_"
    _, found, rest = parameter_name.partition(marker)
    return rest if found else None


def task_of(parameter_name: str) -> str | None:
    """The task of a head's parameter; None for any other parameter."""
    name = saved_name(parameter_name)
    return name.rpartition(".")[0] if name else None


def _key(task: str) -> str:
    # nn.ModuleDict rejects the names of its own methods ("keys", "train"); the prefix allows every task name
    return f"task_{task}"
