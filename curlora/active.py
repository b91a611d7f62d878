"""The active adapters of a layer as one: their indices, factors and masks joined, for one gather before any update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .core import CurloraCore


@dataclass(frozen=True)
class Active:
    """What the update of a forward pass consists of; k is the sum of the sizes of all active adapters."""

    cores: list[CurloraCore]
    rows: Tensor
    """I (k,)."""
    cols: Tensor
    """J (k,)."""
    middle: Tensor | None
    """M (k, k), block diagonal."""
    columns: Tensor
    """C (m, k)."""


def join(cores: list[CurloraCore]) -> Active:
    """Several adapters as one. Each core is called, so that ZeRO-3's hooks gather its U."""
    middles = [core() for core in cores]
    if len(cores) == 1:
        core = cores[0]
        return Active(cores, core.rows, core.cols, middles[0], core.columns)
    rows, cols = torch.cat([core.rows for core in cores]), torch.cat([core.cols for core in cores])
    columns = torch.cat([core.columns for core in cores], dim=1)
    return Active(cores, rows, cols, torch.block_diag(*middles), columns)


def alone(core: CurloraCore) -> Active:
    """One adapter, without computing its M."""
    return Active([core], core.rows, core.cols, None, core.columns)


def joined_mask(cores: list[CurloraCore], x: Tensor) -> Tensor | None:
    """Dropout masks of all adapters side by side (..., k), None without dropout."""
    masks = [core.mask(x) for core in cores]
    if all(mask is None for mask in masks):
        return None
    ones = (x.new_ones(*x.shape[:-1], core.size) for core in cores)
    return torch.cat([one if mask is None else mask for mask, one in zip(masks, ones, strict=True)], dim=-1)


def gathered_parts(cores: list[CurloraCore], name: str) -> Tensor:
    """A derived tensor of all adapters, one below the other."""
    parts = [getattr(core, name) for core in cores]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def plain(base: nn.Module, x: Tensor) -> bool:
    """Whether base and update can run as one function: a frozen, unpartitioned, unhooked dense layer in x's dtype."""
    if _hooked(base):
        return False  # before the weight is accessed: under ZeRO-3 that would gather it once more
    weight = getattr(base, "weight", None)
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and not weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not hasattr(weight, "ds_id")
        and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        and not transformed()
        and "forward" not in base.__dict__
    )


def _hooked(base: nn.Module) -> bool:
    """Whether calling the module does more than its forward: any hook, also of the backward pass."""
    return bool(base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


def transformed() -> bool:
    """Whether torch.func differentiates or vectorises this call, which takes operations and no autograd functions."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
