"""Root-mean-square norms over the last dimension, several rows a program, with a frozen weight.

Torch's kernel gives each row a program, and a head of 128 elements keeps few of its threads busy: norms of queries and
keys then run at a third of the memory's speed. Any Triton target.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import RowBlocks, launch

_ELEMENTS = 4096  # of the rows that a program holds


@triton.jit
def scale_of(total, D, eps):
    """`1 / sqrt(mean + eps)` of rows, whose `D` squares make `total`: rounded as torch does it.

    The approximations are off by more, for all of a row alike.
    """
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, tl.cast(D, tl.float32)) + eps))


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, num_rows, D, eps, offset, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """`y = x · scale · (weight + offset)` with `scale = 1 / sqrt(mean(x²) + eps)`."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mask = (row[:, None] < num_rows) & (d[None, :] < D)
    places = row[:, None] * D + d[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32) + offset
    scale = scale_of(tl.sum(x * x, axis=1), D, eps)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, num_rows, D, offset, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """`dx = scale · (g − x̂ · mean(g · x̂))` with `g = dy · (weight + offset)` and `x̂ = x · scale`."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mask = (row[:, None] < num_rows) & (d[None, :] < D)
    places = row[:, None] * D + d[None, :]
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + places, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32) + offset
    scale = tl.load(scale_ptr + row, mask=row < num_rows, other=0.0)[:, None]
    g = dy * weight[None, :]
    x *= scale
    dx = scale * (g - x * tl.div_rn(tl.sum(g * x, axis=1), tl.cast(D, tl.float32))[:, None])
    tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def norm(x_ND: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The norms, in the dtype of `x_ND`, and what their backward needs of each row, `(N,)` in float32.

    Args:
        x_ND: contiguous.
        weight_D: any floating dtype.
        eps: is added to the mean square.
        offset: is added to the weight.
    """
    num_rows, width = x_ND.shape
    y_ND, scale_N = torch.empty_like(x_ND), x_ND.new_empty(num_rows, dtype=torch.float32)
    _launch(_norm_kernel, (x_ND, weight_D, y_ND, scale_N), (width, eps, offset))
    return y_ND, scale_N


def norm_backward(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, scale_N: Tensor, offset: float) -> Tensor:
    """`dx_ND`.

    Args:
        dy_ND: contiguous.
        x_ND: as in forward.
        weight_D: the same.
        scale_N: from `norm`.
        offset: as in forward.
    """
    dx_ND = torch.empty_like(x_ND)
    _launch(_norm_backward_kernel, (dy_ND, x_ND, weight_D, scale_N, dx_ND), (x_ND.shape[1], offset))
    return dx_ND


def _launch(kernel: object, tensors: tuple[Tensor, ...], numbers: tuple[int | float, ...]) -> None:
    num_rows, width = tensors[0].shape if kernel is _norm_kernel else tensors[1].shape
    if num_rows == 0:
        return
    blocks = RowBlocks.of(num_rows, width, _ELEMENTS)
    constants = {"BR": blocks.rows, "BD": blocks.columns}
    launch(kernel, blocks.grid, tensors, (num_rows,), numbers, constants, num_warps=4)
