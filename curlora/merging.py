"""Merging adapters of a layer into its weight, and taking them out again."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .zero import gathered

DIRECT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Merging:
    """The part of a `CurloraLayer` that computes ΔW and merges it."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the orientation of the stored base weight, at least fp32."""
        return self._as_stored(_product(self.factors(adapter)))

    def _as_stored(self, delta: Tensor) -> Tensor:
        weight = self.get_base_layer().weight
        if self.fan_in_fan_out:
            return delta.t()
        return delta.view(len(delta), *weight.shape[1:]) if weight.dim() > 2 else delta

    @torch.no_grad()
    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """C (m, k), M (k, k), R (k, n) of an adapter, at least fp32; other adapters may be merged into the base."""
        if adapter in self._merged_factors:
            return self._merged_factors[adapter]
        self.refresh()
        core = self.curlora_core[adapter]
        with gathered(core.U):
            middle = core()
        rows = core.row_weight
        if rows is None:
            with self.base_tensors() as (weight, _):
                rows = floating(weight)[core.rows]
        rows = rows.to(middle.dtype)
        for columns, other, right in self._merged_factors.values():
            rows = rows - columns[core.rows] @ other @ right
        return core.columns.to(middle.dtype), middle, rows

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the adapters (default: the active ones) to the base weight.

        ``safe_merge`` raises ValueError, before anything changes, if the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.curlora_core:
                continue
            factors = self.factors(name)
            self._untie()
            self._add_to_base(factors, sign=1, check=name if safe_merge else None)
            self._merged_factors[name] = factors
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates; exact up to rounding in the dtype of the base."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_to_base(self._merged_factors.pop(name), sign=-1)
        if self._tied_weight is not None:
            self.get_base_layer().weight, self._tied_weight = self._tied_weight, None
        self.accept_base()

    def _untie(self) -> None:
        """Give the layer its own weight, so that merging into lm_head does not change the embedding."""
        base = self.get_base_layer()
        if self.shares_weight and self._tied_weight is None:
            self._tied_weight = base.weight
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)

    @torch.no_grad()
    def _add_to_base(self, factors: tuple[Tensor, Tensor, Tensor], sign: int, check: str | None = None) -> None:
        base = self.get_base_layer()
        with gathered(base.weight, modifier_rank=0):
            weight = self.get_base_weight()
            delta = self._as_stored(_product(factors))
            # Added in fp32 and rounded once; a bf16 sum with a bf16 update would round twice.
            result = weight.to(delta.dtype).add(delta, alpha=sign).to(weight.dtype)
            if check is not None and not torch.isfinite(result).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {check} seems to be broken: the weights would "
                    "not be finite; nothing was changed."
                )
            if self.quantization_backend is None:
                weight.copy_(result)
            else:
                self.set_base_weight(result)


def floating(weight: Tensor) -> Tensor:
    """A weight in a dtype that torch computes in."""
    return weight if weight.dtype in DIRECT else weight.float()


def _product(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    columns, middle, rows = factors
    return columns @ (middle @ rows)
