"""O-LoRA (arXiv 2310.14152): every task gets an adapter of its own, kept orthogonal to the row spaces of earlier ones.

    penalty = strength · Σ_layers Σ |A_old A_newᵀ|

Earlier adapters are frozen and summed (`carry: stack`). For LoRA, A is its first factor. For CURLoRA, ΔW = C U R, A is
U R in coordinates of an orthonormal basis of R's rows. Whitened blocks of a stack are orthogonal by construction, so
that their penalty is exactly zero and is skipped; it applies to raw factors (`whiten: false`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curlora.continual.options import option
from curlora.continual.parameters import adapter_parameters, differentiable, read
from curlora.continual.strategy import Example, Requires, StepOutput, Strategy, TaskContext, require


class OLora(Strategy):
    """The orthogonality penalty over a stack of LoRA or CURLoRA adapters."""

    name = "olora"
    plain_at_first = True
    requirements: ClassVar = {
        "adapter.carry": Requires(("stack",), "its penalty compares a task's adapter with those of earlier tasks")
    }

    strength: float = option(0.5, "λ₁ of the paper", at_least=0)

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._against: dict[str, Tensor] = {}

    def check(self, model: nn.Module) -> None:
        stacks = _is_curlora(model) or any(".lora_A." in name for name in adapter_parameters(model))
        require(stacks, "its penalty is on the row spaces of LoRA or CURLoRA adapters; use one of these types")

    def before_task(self, model: nn.Module, task: TaskContext) -> None:
        self.check(model)
        against = _curlora_rows(model) if _is_curlora(model) else _lora_rows(model)
        self._against = {name: rows for name, rows in against.items() if rows.any()} if self.strength else {}

    def loss(self, model: nn.Module, examples: list[Example], output: StepOutput) -> Tensor:
        return output.loss + output.weight * self.penalty(model) if self._against else output.loss

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar; its gradient flows into the new A (or U) only."""
        parameters = {name: p for name, p in adapter_parameters(model).items() if name in self._against}
        total = torch.zeros((), device=next(iter(parameters.values())).device)
        for name, value in differentiable(parameters).items():
            self._against[name] = self._against[name].to(value.device)
            total = total + (value.float() @ self._against[name]).abs().sum()
        return self.strength * total


def _is_curlora(model: nn.Module) -> bool:
    return getattr(getattr(model, "base_model", None), "prefix", None) == "curlora_"


def _lora_rows(model: nn.Module) -> dict[str, Tensor]:
    """Name of each trainable A (r, n) → A_oldᵀ (n, r_old) of all frozen adapters on its layer, concatenated."""
    frozen = {name: p for name, p in model.named_parameters() if ".lora_A." in name and not p.requires_grad}
    rows: dict[str, list[Tensor]] = {}
    for name, value in read(frozen).items():
        rows.setdefault(name.partition(".lora_A.")[0], []).append(value.t())
    new = [name for name in adapter_parameters(model) if ".lora_A." in name]
    layers = {name: name.partition(".lora_A.")[0] for name in new}
    return {name: torch.cat(rows[layer], dim=1) for name, layer in layers.items() if layer in rows}


def _curlora_rows(model: nn.Module) -> dict[str, Tensor]:
    """Name of each U (r, r) → R_new (U_old R_old)ᵀ (r, r_old), which U multiplies to A_new A_oldᵀ."""
    names = {id(p): name for name, p in adapter_parameters(model).items()}
    against = {}
    for _, _, core in model.base_model.cores(model.active_adapters[0]):
        if core.settings.blocks == 1:
            continue
        # Rows of R in an orthonormal basis; whitened rows are that basis.
        basis, old = core.norm_right.float(), core.size - core.settings.r
        against[names[id(core.U)]] = basis[old:] @ (torch.block_diag(*core.frozen.float()) @ basis[:old]).t()
    return against
