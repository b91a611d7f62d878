"""Full access to the adapter's trainable parameters for strategies, under any DeepSpeed stage.

ZeRO-1 and ZeRO-2 leave parameters whole. Under ZeRO-3 a parameter may be an empty tensor outside the forward pass of
its module; everything here is then a collective call that all ranks must make in the same order. Trainable parameters
are few and small, so that they are gathered all at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from curlora.zero import gathered


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → trainable parameter of a PEFT model's adapter, without classifier heads; empty for a bare model."""
    tuner = getattr(model, "base_model", None)
    prefix = getattr(tuner, "prefix", None) if hasattr(model, "peft_config") else None
    if prefix is None:
        return {}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and prefix in name}


def require_adapter(model: nn.Module, purpose: str) -> None:
    """Raise ValueError if `model` has no trainable adapter (the head-only probe)."""
    if not adapter_parameters(model):
        raise ValueError(f"{purpose}, but this model trains none; choose an adapter, e.g. curlora or lora")


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, every parameter can be read in full; only those that are partitioned are gathered."""
    away = [p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"]
    with gathered(*away):
        yield


def read(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Full fp32 copies, on the parameters' device."""
    with whole(parameters.values()):
        return {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}


def write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Set parameters (all ranks pass the same values); not while an optimizer holds its own copies."""
    for name, parameter in parameters.items():
        with gathered(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(values[name])


def differentiable(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Full tensors whose gradients flow into the parameters, even while those are partitioned.

    For penalties: autograd adds this gradient to that of the forward pass before DeepSpeed's hooks see it.
    """
    with whole(parameters.values()):
        return {name: _Whole.apply(p, p.detach().clone()) for name, p in parameters.items()}


class _Whole(torch.autograd.Function):
    """The identity function from a parameter, which may be an empty shard, to its full value."""

    @staticmethod
    def forward(ctx, parameter: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


@contextlib.contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a forward pass uses `values`; afterwards all parameters are restored bit for bit.

    Storage is swapped, never overwritten: an earlier forward pass may hold views of it for its backward pass.
    """
    chosen = list(parameters.values())
    persist = [getattr(p, "ds_persist", None) for p in chosen]
    with whole(chosen):
        kept = [p.data for p in chosen]
        for (name, p), lasting in zip(parameters.items(), persist, strict=True):
            p.data = values[name].to(device=p.device, dtype=p.dtype)
            if lasting is not None:
                p.ds_persist = True  # otherwise ZeRO-3's module hooks release it after its first use
        try:
            yield
        finally:
            for p, data, lasting in zip(chosen, kept, persist, strict=True):
                p.data = data
                if lasting is not None:
                    p.ds_persist = lasting
