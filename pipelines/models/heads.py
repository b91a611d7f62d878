"""Linear classifier heads, one a task, inside the model under `task_heads`, saved to `heads.safetensors`.

They sit in the causal language model itself (below PEFT's wrapper), so DeepSpeed shards them like any parameter and
PEFT, which saves only what carries its prefix, leaves them alone. They are counted apart from the adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

ATTRIBUTE = "task_heads"


def causal_lm(model: nn.Module) -> nn.Module:
    """The language model below PEFT's wrappers (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_heads(model: nn.Module, classes: Mapping[str, int], seed: int) -> nn.ModuleDict:
    """Put a head for each task (name → number of classes) into the model; frozen until `train_heads`.

    A head is drawn from N(0, 0.02²) by (seed, task name): the same on every rank and in every run.
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
    """Only the heads of `tasks` get gradients."""
    for key, head in (get_heads(model) or {}).items():
        head.requires_grad_(key in {_key(task) for task in tasks})


def trainable_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Task name → head, of the heads that get gradients, in a fixed order."""
    heads = get_heads(model) or {}
    return {key.removeprefix("task_"): head for key, head in sorted(heads.items()) if head.weight.requires_grad}


def heads_of(model: nn.Module, tasks: Iterable[str]) -> dict[str, nn.Linear]:
    """Task name → head, of those of `tasks` that have one, in a fixed order."""
    heads = get_heads(model) or {}
    return {task: heads[_key(task)] for task in sorted(tasks) if _key(task) in heads}


def load_heads(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved heads (`<task>.weight`, `<task>.bias`) into the attached ones; others stay as they are."""
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
    """`<task>.weight` of a head's full parameter name, None for any other parameter."""
    marker = f"{ATTRIBUTE}.task_"
    _, found, rest = parameter_name.partition(marker)
    return rest if found else None


def task_of(parameter_name: str) -> str | None:
    """The task whose head a parameter belongs to, None for any other."""
    name = saved_name(parameter_name)
    return name.rpartition(".")[0] if name else None


def _key(task: str) -> str:
    # nn.ModuleDict refuses names of its own methods ("keys", "train"): the prefix keeps every task name possible
    return f"task_{task}"
