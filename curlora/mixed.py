"""Mixed batches: every row of a batch with its own adapter (the argument ``adapter_names`` of PEFT's forward).

Adapters of one model usually share their rows and columns, which depend on the seed and the rule alone. They then
share z = R x and C as well, and what differs per row is one (k, k) matrix: one batched product serves any number of
adapters. Adapters with other rows and columns form a group of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .core import CurloraCore

BASE = "__base__"
"""PEFT's name for a row without an adapter."""


class RowNames(list):
    """The adapter of each row of a batch, with the distinct names and each row's position among them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.distinct = list(dict.fromkeys(names))
        place = {name: position for position, name in enumerate(self.distinct)}
        self.positions = torch.tensor([place[name] for name in names])


def grouped(names: RowNames, cores: nn.ModuleDict) -> list[tuple[list[CurloraCore], Tensor]]:
    """Cores with the same rows and columns, and for each row of the batch the position of its core, -1 for none."""
    groups: dict[object, list[tuple[int, CurloraCore]]] = {}
    for position, name in enumerate(names.distinct):
        if name != BASE and name in cores:
            if not cores[name].ready:
                cores[name]()  # raises, with the reason
            groups.setdefault(cores[name].place, []).append((position, cores[name]))
    result = []
    for members in groups.values():
        table = torch.full((len(names.distinct),), -1)
        table[[position for position, _ in members]] = torch.arange(len(members))
        result.append(([core for _, core in members], table[names.positions]))
    return result


def middles(cores: list[CurloraCore]) -> Tensor:
    """M of each core (cores, k, k), at least fp32."""
    special = any(
        core.settings.blocks > 1 or core.settings.config.max_update_norm is not None or hasattr(core.U, "ds_id")
        for core in cores
    )
    if special or len({core.right is None for core in cores}) > 1:
        return torch.stack([core() for core in cores])
    current = torch.stack([core.U for core in cores])
    current = current.to(torch.promote_types(current.dtype, torch.float32))
    result = torch.stack([core.left for core in cores]).to(current.dtype) @ current
    if cores[0].right is None:
        return result
    return result @ torch.stack([core.right for core in cores]).to(current.dtype)


def add_rows(y: Tensor, z: Tensor, cores: list[CurloraCore], rows: Tensor) -> Tensor:
    """y (B, ..., m) plus C M_b z_b, where M_b is that of the core at ``rows[b]``, or 0 at -1; z (B, ..., k)."""
    matrices = middles(cores)
    rows = rows.to(matrices.device)
    absent = bool((rows < 0).any())
    if absent:
        matrices = torch.cat([matrices, matrices.new_zeros(1, *matrices.shape[1:])])
    each = matrices[rows]
    inner = z.reshape(len(z), -1, z.shape[-1]).to(each.dtype) @ each.transpose(1, 2)
    columns = cores[0].columns.to(y.dtype)
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), inner.to(y.dtype).reshape(-1, inner.shape[-1]), columns.t())
    return flat.view(y.shape)


# ------------------------------------------------------------------------------------------- the whole model


@contextlib.contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str] | None, known: set[str], beams: object) -> Iterator[None]:
    """Inside, every adapted layer of the model receives the names; with beam search each of them ``beams`` times.

    Raises ValueError for a name that is not ``known``, or in training mode.
    """
    if names is None:
        yield
        return
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted({name for name in names if name != BASE} - known)
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    beams = beams if isinstance(beams, int) else 1
    encoder = _encoder(model) if beams > 1 else None
    inside = set() if encoder is None else set(encoder.modules())
    single, repeated = RowNames(names), RowNames([name for name in names for _ in range(beams)])
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    hooks = [partial(_pass_names, single if layer in inside else repeated) for layer in layers]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in zip(layers, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_names(names: RowNames, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": names}


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, whose inputs beam search does not repeat."""
    inner = model.model
    encoder = inner.get_encoder() if hasattr(inner, "get_encoder") else None
    return None if encoder is inner else encoder
