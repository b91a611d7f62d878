"""The gather identity as autograd functions: R x = W[I, :] x = (W x)[I], and its dual Cᵀ g = (Wᵀ g)[J].

``cur_linear`` fuses a frozen dense layer with its update; ``cur_residual`` adds the update to the output of any base
layer (quantised, partitioned, hooked); ``cur_added`` adds it where z is known already. They save z (tokens, k) for the
backward pass and nothing of the size of the layer. Whitening and the combination of adapters are already contained in
``middle`` M (k, k).

    forward     z = y[..., I] − b[I]        y ← y + C M z
    backward    c = Cᵀ ∂y                   ∂M = c zᵀ        ∂z = Mᵀ c        ∂x ← ∂x + Rᵀ ∂z

If the base layer's own ∂x = Wᵀ ∂y is available, c is gathered from it: c = ∂x[..., J].

In half precision y − b would lose what the bias has rounded away; there, z of a layer with a bias is computed as R x.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context without autocast, which would compute the r×r products in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def cur_linear(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    middle: Tensor,
    columns: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b plus the update, for a frozen dense layer.

    x (..., n), kernel (n, m) = Wᵀ, bias (m,), rows and cols (k,) int64 = I and J, middle (k, k), columns (m, k) = C =
    W[:, J], mask (..., k) multiplies z (dropout). Returns (..., m). x and kernel share one dtype.
    """
    y = _CurLinear.apply(_flat(x), kernel, bias, rows, cols, middle, columns, _flat(mask))
    return y.view(*x.shape[:-1], y.shape[-1])


def cur_residual(
    y: Tensor,
    rows: Tensor,
    bias_rows: Tensor | None,
    middle: Tensor,
    columns: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """y plus the update, where y (..., m) is the base layer's output and bias_rows (k,) = b[I]."""
    return _CurResidual.apply(_flat(y), rows, bias_rows, middle, columns, _flat(mask)).view(y.shape)


def cur_added(y: Tensor, z: Tensor, middle: Tensor, columns: Tensor, mask: Tensor | None = None) -> Tensor:
    """y (..., m) plus C M z, for z (..., k); in operations that can be differentiated any number of times."""
    z = z if mask is None else z * mask.to(z.dtype)
    return y + (_through(z, middle) @ columns.to(z.dtype).t()).to(y.dtype)


def _flat(x: Tensor | None) -> Tensor | None:
    """(..., n) as (tokens, n).

    Shapes change outside the autograd functions: autograd refuses in-place operations on a view that one returns.
    """
    return None if x is None else x.reshape(-1, x.shape[-1])


def _in_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast to the dtype of the output, which differs from that of the input under autocast."""
    return None if tensor is None else tensor.to(dtype)


def _through(z: Tensor, middle: Tensor) -> Tensor:
    """M z for z (tokens, k), computed in the precision of M: half precision would spoil the whitening."""
    return (z.to(middle.dtype) @ middle.t()).to(z.dtype)


def _gradients(
    inner: Tensor, z: Tensor, middle: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """∂L/∂M = c zᵀ and ∂L/∂z = Mᵀ c, the latter in the given dtype, from c = Cᵀ ∂y (tokens, k)."""
    inner = inner.to(middle.dtype)
    grad_z = (inner @ middle).to(dtype)
    return inner.t() @ z.to(middle.dtype), grad_z if mask is None else grad_z * mask


def _rows_of(kernel: Tensor, rows: Tensor) -> Tensor:
    """R = W[I, :] (k, n) from kernel (n, m) = Wᵀ; selecting along the strided dimension would copy all of W."""
    if kernel.is_contiguous():
        return kernel.index_select(1, rows).t()
    return kernel.t().index_select(0, rows)


def _rows_output(x: Tensor, y: Tensor, kernel: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """z (tokens, k) = R x, gathered from y = W x + b where that loses nothing."""
    if bias is None:
        return y.index_select(1, rows)
    if y.dtype in HALF:
        return x @ _rows_of(kernel, rows).t()
    return y.index_select(1, rows).sub_(bias.index_select(0, rows))


class _CurLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, rows, cols, middle, columns, mask):
        y = x @ kernel if bias is None else torch.addmm(bias, x, kernel)
        z = _rows_output(x, y, kernel, bias, rows)
        mask = _in_dtype(mask, y.dtype)
        if mask is not None:
            z *= mask
        y.addmm_(_through(z, middle), columns.t())
        ctx.save_for_backward(kernel, rows, cols, middle, columns, z, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernel, rows, cols, middle, columns, z, mask = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ kernel.t()
            grad_middle, grad_z = _gradients(grad_x.index_select(1, cols), z, middle, mask, grad.dtype)
            # Scattering ∂z into ∂y would copy all of ∂y; R is k gathered rows of W, which is much less to read.
            grad_x.addmm_(grad_z, _rows_of(kernel, rows))
        else:
            grad_middle, _ = _gradients(grad @ columns, z, middle, mask, grad.dtype)
        return grad_x, None, None, None, None, grad_middle, None, None


class _CurResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, rows, bias_rows, middle, columns, mask):
        mask = _in_dtype(mask, y.dtype)
        columns = columns.to(y.dtype)
        z = y.index_select(1, rows)
        if bias_rows is not None:
            z -= bias_rows.to(y.dtype)
        if mask is not None:
            z *= mask
        ctx.save_for_backward(rows, middle, columns, z, mask)
        return torch.addmm(y, _through(z, middle), columns.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, middle, columns, z, mask = ctx.saved_tensors
        grad_middle, grad_z = _gradients(grad @ columns, z, middle, mask, grad.dtype)
        grad_y = grad.index_add(1, rows, grad_z) if ctx.needs_input_grad[0] else None
        # A bias that trains reaches the output through y alone: z = (W x)[I] does not contain it.
        grad_bias = -grad_z.sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_y, None, grad_bias, grad_middle, None, None
