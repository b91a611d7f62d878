"""Access to parameters that DeepSpeed has partitioned or copied; without DeepSpeed, nothing here has an effect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def gathered(*parameters: Tensor | None, modifier_rank: int | None = None) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has partitioned for the duration of the block, a collective call; else do nothing.

    ``modifier_rank=None`` is for reading: changes are not broadcast on exit.
    """
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # only if a parameter is partitioned: the import takes a second

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def set_master_copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Update the fp32 copy of the parameter that DeepSpeed's optimizer holds, if there is one."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_set_full_fp32_param  # only under DeepSpeed: the import takes a second

        safe_set_full_fp32_param(parameter, value.float())


def peek(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module as it is; reading the attribute in a forward pass would make ZeRO-3 gather it."""
    found = module._parameters.get(name)  # no call of __getitem__, which DeepSpeed has replaced
    return getattr(module, name, None) if found is None else found
