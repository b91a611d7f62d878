"""What an adapted layer reads from its base: the weight, the bias, and R x."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .active import Active, gathered_parts, transformed
from .functional import HALF
from .zero import gathered


class BaseAccess:
    """The part of a `CurloraLayer` that knows how its base is stored: transposed, quantised, partitioned, nested."""

    @contextlib.contextmanager
    def base_tensors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight as (m, n) and bias of the base layer for reading: gathered, dequantised, transposed if necessary."""
        base, bias = self.get_base_layer(), self._bias()
        with gathered(base.weight, bias), torch.no_grad():
            weight = self.get_base_weight()
            yield (weight.t() if self.fan_in_fan_out else weight), bias

    def get_base_weight(self) -> Tensor:
        """The base weight in its stored orientation, dequantised if necessary."""
        self._unpack()
        return super().get_base_weight()

    def _unpack(self) -> None:
        """Undo the repacking of a 4 bit weight by bitsandbytes, for evaluation on a CPU with AVX512.

        A packed weight dequantises to noise and its product has no gradient; building the state dict unpacks it.
        """
        base = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()

    def _nested(self) -> bool:
        """Whether this layer lies around the layer of an adapter of another type."""
        return isinstance(self.base_layer, BaseTunerLayer)

    def _bias(self) -> Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)

    def _rows_output(self, x: Tensor, y: Tensor, active: Active) -> Tensor | None:
        """z = R x (..., k) where it must not be gathered from y (..., m); None where it can be.

        Half precision rounds z away in y = W x + b; another adapter's layer below this one adds its own update to y.
        """
        bias = self._bias()
        if self._nested() or (bias is not None and y.dtype in HALF):
            weight = self._row_weight(active)
            if weight is not None:
                return nn.functional.linear(x, weight.to(x.dtype)).to(y.dtype)
        if not transformed():
            return None
        z = y.index_select(-1, active.rows)
        return z if bias is None else z - self._bias_rows(active).to(y.dtype)

    def _row_weight(self, active: Active) -> Tensor | None:
        """R (k, n), kept or read from the base; None if the base is elsewhere."""
        if active.cores[0].row_weight is not None:
            return gathered_parts(active.cores, "row_weight")
        weight = self.get_base_layer().weight
        if hasattr(weight, "ds_id") or weight.is_meta != active.rows.is_meta:
            return None
        return weight.index_select(1, active.rows).t() if self.fan_in_fan_out else weight.index_select(0, active.rows)

    def _bias_rows(self, active: Active) -> Tensor | None:
        """b[I] (k), as it is now if the bias can be read."""
        bias = self._bias()
        if bias is None:
            return None
        if hasattr(bias, "ds_id") or bias.is_meta != active.rows.is_meta:
            return gathered_parts(active.cores, "bias_rows")
        return bias.index_select(0, active.rows)
