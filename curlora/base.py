"""What an adapted layer reads from its base: the weight, the bias, and R x."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .active import Active, gathered_parts, transformed
from .functional import HALF
from .zero import gathered, peek


class BaseAccess:
    """The part of a `CurloraLayer` that knows how its base is stored: transposed, quantised, partitioned, nested."""

    @contextlib.contextmanager
    def base_tensors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight as (m, n) and bias of the base layer for reading: gathered, dequantised, transposed if necessary."""
        base, bias = self.get_base_layer(), self._bias()
        with gathered(base.weight, bias), torch.no_grad():
            weight = self.get_base_weight().flatten(1)
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
        return peek(self.get_base_layer(), "bias")

    def rows_output(self, x: Tensor, y: Tensor, active: Active) -> Tensor:
        """z = R x (..., k) of an input x and the base layer's output y (..., m)."""
        z = self._rows_output(x, y, active)
        if z is None:
            z, bias = y.index_select(-1, active.rows), self._bias_rows(active)
            z = z if bias is None else z - bias.to(z.dtype)
        return z

    def _rows_output(self, x: Tensor, y: Tensor, active: Active) -> Tensor | None:
        """z = R x (..., k) where it must not be gathered from y (..., m); None where it can be.

        Half precision rounds z away in y = W x + b; another adapter's layer below this one adds its own update to y.
        """
        bias = self._bias()
        if self._nested() or (bias is not None and y.dtype in HALF):
            weight = self._row_weight(active)
            if weight is not None:
                return self._times_rows(x, weight.to(x.dtype if x.is_floating_point() else y.dtype)).to(y.dtype)
        if not transformed():
            return None
        z = y.index_select(-1, active.rows)
        return z if bias is None else z - self._bias_rows(active).to(y.dtype)

    def _row_weight(self, active: Active) -> Tensor | None:
        """R (k, n), kept or read from the base; None if the base is elsewhere."""
        if active.cores[0].row_weight is not None:
            return gathered_parts(active.cores, "row_weight")
        weight = peek(self.get_base_layer(), "weight")
        if hasattr(weight, "ds_id") or weight.is_meta != active.rows.is_meta:
            return None
        if self.fan_in_fan_out:
            return weight.index_select(1, active.rows).t()
        return weight.flatten(1).index_select(0, active.rows)

    def _times_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        """R x (..., k) for R (k, n)."""
        return nn.functional.linear(x, weight)

    def channels_last(self, y: Tensor) -> Tensor:
        """The base layer's output with its m entries in the last dimension."""
        return y

    def _channels_back(self, y: Tensor) -> Tensor:
        """The inverse of `channels_last`."""
        return y

    def _stored_place(self, row: int, column: int) -> tuple[int, ...]:
        """Where the base's weight holds W[row, column]."""
        if self.fan_in_fan_out:
            return column, row
        place = []
        for size in reversed(self.get_base_layer().weight.shape[1:]):
            column, rest = divmod(column, size)
            place.append(rest)
        return row, *reversed(place)

    def _bias_rows(self, active: Active) -> Tensor | None:
        """b[I] (k), as it is now if the bias can be read."""
        bias = self._bias()
        if bias is None:
            return None
        if hasattr(bias, "ds_id") or bias.is_meta != active.rows.is_meta:
            return gathered_parts(active.cores, "bias_rows")
        return bias.index_select(0, active.rows)


def features(base: nn.Module) -> tuple[int, int]:
    """n and m of W (m, n)."""
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, nn.modules.conv._ConvNd):
        return base.in_channels * math.prod(base.kernel_size) // base.groups, base.out_channels
    return base.in_features, base.out_features


def stored_transposed(base: nn.Module, fan_in_fan_out: bool) -> bool:
    """Whether the weight is stored as (n, m). Known types decide, also for square layers; then ``fan_in_fan_out``."""
    if isinstance(base, (Conv1D, nn.Embedding)):
        return True
    if isinstance(base, nn.Linear):
        if fan_in_fan_out:
            warnings.warn("fan_in_fan_out=True is ignored for torch.nn.Linear, which stores (out, in).", stacklevel=2)
        return False
    return fan_in_fan_out
