"""Named groups of tensors in one flat dict: how strategies write their state to a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def pack(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors on the CPU under "group.name"."""
    return {f"{group}.{name}": tensor.cpu() for group, named in groups.items() for name, tensor in named.items()}


def unpack(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors of one group by name: the inverse of `pack`."""
    prefix = f"{group}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
