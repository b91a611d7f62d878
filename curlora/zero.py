"""What DeepSpeed does to parameters, undone where it matters; without DeepSpeed nothing here does anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def gathered(*parameters: Tensor | None, modifier_rank: int | None = None) -> Iterator[None]:
    """Whole parameters inside the block where ZeRO-3 has partitioned them (a collective); otherwise nothing.

    ``modifier_rank=None`` means reading only: nothing is broadcast on exit.
    """
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # only where a parameter really is partitioned: the import takes a second

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def set_master_copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Tell DeepSpeed's optimizer, if one holds an fp32 copy of the parameter, its new value."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_set_full_fp32_param  # only under DeepSpeed: the import takes a second

        safe_set_full_fp32_param(parameter, value.float())
