"""CLoRA (arXiv 2410.16801): keep LoRA's update out of random subspaces of each layer's input and output.

    penalty = strength · Σ_layers ½ (‖A P_in‖_F² + ‖Bᵀ P_out‖_F²)

A (r, n), B (m, r); P_in (n, k) and P_out (m, k) are orthonormal, random and frozen, one pair per layer. They are not
saved but drawn again from (seed, layer name), identically on every rank and in every task.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, differentiable
from curlora.continual.strategy import Example, StepOutput, Strategy, TaskContext, require


class CLora(Strategy):
    """The subspace penalty over any kind of LoRA."""

    name = "clora"

    strength: float = option(1.0, "λ of the paper", at_least=0)
    k: int = option(128, "columns of each P, fewer than the smallest side of an adapted layer", at_least=1)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._subspaces: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        factors = _factors(model)
        require(bool(factors), "its penalty is on LoRA's factors A and B, which this adapter lacks; use type: lora")
        smallest = min(factors.values())
        require(self.k < smallest, f"k is {self.k}, but a layer has a side of {smallest}; use a smaller k")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        device = next(iter(adapter_parameters(model).values())).device
        if self.strength:
            self._subspaces = {
                name: subspace(task.seed, name, side, self.k).to(device) for name, side in _factors(model).items()
            }

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return output.loss + output.weight * self.penalty(model) if self.strength else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar; its gradient flows into A and B."""
        parameters = {name: p for name, p in adapter_parameters(model).items() if name in self._subspaces}
        total = torch.zeros((), device=next(iter(self._subspaces.values())).device)
        for name, factor in differentiable(parameters).items():
            factor = factor if ".lora_A." in name else factor.t()
            total = total + (factor.float() @ self._subspaces[name]).square().sum()
        return self.strength / 2 * total


def subspace(seed: int, name: str, side: int, k: int) -> Tensor:
    """(side, k) with orthonormal columns, uniformly distributed, determined by (seed, parameter name)."""
    salt = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(salt[:8], "big") >> 1)
    return torch.linalg.qr(torch.randn(side, k, generator=generator))[0]


def _factors(model: nn.Module) -> dict[str, int]:
    """Parameter name → number of rows of its P: n for each A (r, n), m for each B (m, r)."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in adapter_parameters(model).items()}
    inputs = {name: shape[1] for name, shape in shapes.items() if ".lora_A." in name}
    return inputs | {name: shape[0] for name, shape in shapes.items() if ".lora_B." in name}
