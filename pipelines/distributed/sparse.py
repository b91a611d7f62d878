"""Mixtures whose experts are modules of their own: an expert without tokens does not run, and that on one rank only.

Under ZeRO-3, other ranks would wait for that rank to help gather the expert's weights. Under ZeRO-1 and 2, where
gradients are summed in the order in which they become ready, they would be added to those of other parameters.
Experts that are fused into single tensors, as in Transformers 5, always run as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a list of experts."""
    return [module for module in model.modules() if any(map(_lists_experts, module.named_children()))]


def _lists_experts(child: tuple[str, nn.Module]) -> bool:
    name, module = child
    return "expert" in name.lower() and isinstance(module, nn.ModuleList | nn.ModuleDict)


def gather_experts_together(model: nn.Module) -> None:
    """Let ZeRO-3 gather all experts of a block, and sum their gradients, when the block runs."""
    blocks = expert_blocks(model)
    if blocks:
        from deepspeed.utils import set_z3_leaf_module  # slow

        for block in blocks:
            set_z3_leaf_module(block, True)


@contextlib.contextmanager
def experts_ready_together(model: nn.Module) -> Iterator[None]:
    """Make the gradients of a block's experts ready at one moment and in one order, zeros for experts without tokens.

    The block's input is increased by zero times every trained parameter: none is ready before the gradient of that
    input is, and so before the last expert of the block.
    """
    with contextlib.ExitStack() as stack:
        for block in expert_blocks(model):
            parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
            if parameters:
                stack.enter_context(_increased_by_zero(block, parameters))
        yield


@contextlib.contextmanager
def _increased_by_zero(block: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    def increase(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not torch.is_grad_enabled():
            return args, kwargs
        if args:
            return (_increased(args[0], parameters), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: _increased(kwargs[first], parameters)}

    hook = block.register_forward_pre_hook(increase, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _increased(hidden: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    return hidden + (sum(parameter.sum() for parameter in parameters) * 0.0).to(hidden.dtype)
