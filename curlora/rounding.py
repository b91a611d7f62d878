"""How well factors can be rebuilt from a base that is stored more coarsely than the one they were selected on.

A factor consists of the base's own columns. Loaded in 4 bit, a small column between large ones is little but rounding
noise, and whitening amplifies it: ΔW is then another update than the one that was trained.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import cur
from .record import BaseMismatchError

SAME = 1e-6
"""Up to this deviation of its fingerprint a base has the weights that the adapter was made on, bit for bit."""

NOTED, REFUSED = 0.25, 0.5
"""Relative error of ΔW from which on rounding is worth a warning, or an error; 4 bit on its own causes about 0.13."""


def check_factors(
    key: str, base: nn.Module, weight: Tensor, rows: cur.Factor, columns: cur.Factor, whiten: bool, deviation: float
) -> None:
    """Raise BaseMismatchError if the factors cannot be rebuilt from W (m, n), warn if only roughly.

    ``deviation`` is that of the base's fingerprint from the adapter's.
    """
    if deviation <= SAME:
        return
    condition = max(rows.condition, columns.condition)
    broken = whiten and not condition <= cur.MAX_CONDITION
    error = math.inf if broken else rebuild_error(base, weight, rows, columns, whiten)
    if error < NOTED:
        return
    found = f"a condition number of {condition:.1e}" if broken else f"an expected error of {error:.0%} of the update"
    message = (
        f"{key}: this base is stored too coarsely for the rows and columns of the adapter: rebuilding its factors "
        f"gives {found}. Load the base in the precision that the adapter was trained in, or train the adapter on this "
        "base."
    )
    if error >= REFUSED:
        raise BaseMismatchError(message)
    warnings.warn(message, stacklevel=2)


def rebuild_error(base: nn.Module, weight: Tensor, rows: cur.Factor, columns: cur.Factor, whiten: bool) -> float:
    """Expected ‖error of ΔW‖_F / ‖ΔW‖_F that rounding causes; 0 where the format of the base is not known."""
    rounding = _rounding(base, weight)
    if rounding is None:
        return 0.0
    every_row = torch.arange(weight.shape[0], device=weight.device)[:, None]
    every_column = torch.arange(weight.shape[1], device=weight.device)[None]
    i, j = rows.indices.to(weight.device), columns.indices.to(weight.device)
    errors = (
        _relative(columns, rounding(every_row, j[None]), whiten),
        _relative(rows, rounding(i[:, None], every_column).t(), whiten),
    )
    return math.hypot(*errors)


def _relative(factor: cur.Factor, rounding: Tensor, whiten: bool) -> float:
    """‖E T⁻¹‖_F / √k, or ‖E‖_F / ‖C‖_F of a raw factor, for independent errors E of the given size (d, k)."""
    energy = rounding.double().square().sum(dim=0).cpu()
    if not whiten:
        return float(energy.sum().sqrt()) / factor.norm
    inverse = cur.whitening(factor.triangle)
    return float((energy @ inverse.square().sum(dim=1) / len(inverse)).sqrt())


def _rounding(base: nn.Module, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A function from indices (i, j), broadcast, to the root-mean-square rounding error of W[i, j]."""
    state = getattr(base.weight, "quant_state", None)
    if state is not None:
        return _four_bit(state, weight)
    scales = getattr(base.weight, "SCB", None)
    if scales is not None:  # bitsandbytes, 8 bit: 127 steps to the largest value of each row
        return lambda i, j: (scales[i] / 127 / math.sqrt(12)).expand(torch.broadcast_shapes(i.shape, j.shape))
    if weight.dtype in (torch.bfloat16, torch.float16):
        return lambda i, j: weight[i, j].float().abs() * (0.2 * torch.finfo(weight.dtype).eps)
    return None


def _four_bit(state, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """bitsandbytes, 4 bit: an entry of a code book, each for an interval, times the largest value of a row's block."""
    maxima, book = _block_maxima(state).to(weight.device), state.code.float().to(weight.device).unique()
    edges = torch.cat([book[:1], (book[1:] + book[:-1]) / 2, book[-1:]])
    above, below = edges[1:] - book, edges[:-1] - book
    rounding = ((above**3 - below**3) / (above - below) / 3).sqrt()

    def of(i: Tensor, j: Tensor) -> Tensor:
        largest = maxima[(i * weight.shape[1] + j) // state.blocksize]
        cell = torch.searchsorted(edges, weight[i, j].float() / largest) - 1
        return largest * rounding[cell.clamp(0, len(book) - 1)]

    return of


def _block_maxima(state) -> Tensor:
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise  # only where it has quantised the base

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
