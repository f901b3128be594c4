"""Gates: `a = gate(h)` and its backward, elementwise in float32 at the speed of memory.

The backward is one pass over `h` and `da`: `a` again, `dh`, and the router's gradient `⟨a, da⟩` of each row. On an H200
these kernels move 4 TB/s; plain Triton that fuses them into the grouped products loses up to half of their speed.
A gate is two `jit` functions, handed to the kernels. Any Triton target.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch

_BLOCK = 256  # columns at a time
_ROWS = 4  # rows a program


@triton.jit
def _sigmoid(x):
    """`tl.sigmoid` without its division, in two thirds of the instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def _silu(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return g * _sigmoid(g) * u


@triton.jit
def _silu_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    sigmoid = _sigmoid(g)
    silu = g * sigmoid
    return silu * u, da * u * (sigmoid + silu * (1.0 - sigmoid)), da * silu


@triton.jit
def _gelu(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)) * u


@triton.jit
def _gelu_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return g * cdf * u, da * u * (cdf + g * density), da * g * cdf


@triton.jit
def _gelu_tanh(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    # 0.5 (1 + tanh z) is sigmoid(2z)
    return g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u


@triton.jit
def _gelu_tanh_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    sigmoid = _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    return g * sigmoid * u, da * u * (sigmoid + g * sigmoid * (1.0 - sigmoid) * slope), da * g * sigmoid


@triton.jit
def _within(g, u, LIMIT: tl.constexpr):
    """Gate and up in their limits; what is no number stays none, as torch has it."""
    g = tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    u = tl.maximum(u, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return g, tl.minimum(u, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _positive(g):
    return tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamped(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    g, u = _within(g, u, LIMIT)
    return g * _sigmoid(ALPHA * g) * u


@triton.jit
def _clamped_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return _clamped_slopes(g, u, da, ALPHA, LIMIT, 0.0)


@triton.jit
def _shifted(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    g, u = _within(g, u, LIMIT)
    return g * _sigmoid(ALPHA * g) * (u + 1.0)


@triton.jit
def _shifted_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    return _clamped_slopes(g, u, da, ALPHA, LIMIT, 1.0)


@triton.jit
def _clamped_slopes(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    passes_g = g <= LIMIT
    passes_u = (u <= LIMIT) & (u >= -LIMIT)
    g, u = _within(g, u, LIMIT)
    u += SHIFT
    sigmoid = _sigmoid(ALPHA * g)
    glu = g * sigmoid
    dg = da * u * (sigmoid + ALPHA * glu * (1.0 - sigmoid))
    return glu * u, tl.where(passes_g, dg, 0.0), tl.where(passes_u, da * glu, 0.0)


@triton.jit
def _relu_squared(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    g = _positive(g)
    return g * g


@triton.jit
def _relu_squared_grad(g, u, da, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    g = _positive(g)
    return g * g, 2.0 * g * da, da


@dataclass(frozen=True)
class GateKernel:
    """A gate's device functions and how gate and up lie in a row of `h_NG`.

    Args:
        function: `(g, u) -> a`.
        grad: `(g, u, da) -> (a, dg, du)`.
        is_concatenated: `[gate | up]`, else interleaved.
        alpha, limit: for the clamped gates.
        has_up: whether there are two of them in a row; otherwise it is `h_NF`, and `u` and `du` mean nothing.
    """

    function: Any
    grad: Any
    is_concatenated: bool
    alpha: float = 1.0
    limit: float = 0.0
    has_up: bool = True


SILU, GELU, GELU_TANH, CLAMPED, SHIFTED, RELU_SQUARED = (
    (_silu, _silu_grad),
    (_gelu, _gelu_grad),
    (_gelu_tanh, _gelu_tanh_grad),
    (_clamped, _clamped_grad),
    (_shifted, _shifted_grad),
    (_relu_squared, _relu_squared_grad),
)


@triton.jit
def _load_gate_up(
    h_ptr, row, in_rows, first, F, HAS_UP: tl.constexpr, IS_CONCATENATED: tl.constexpr, BLOCK: tl.constexpr
):
    """Gate and up of a tile, in float32."""
    f = first + tl.arange(0, BLOCK)
    mask = in_rows[:, None] & (f < F)[None, :]
    if not HAS_UP:
        g = tl.load(h_ptr + row[:, None] * F + f[None, :], mask=mask, other=0.0)
        u = g
    elif IS_CONCATENATED:
        offset = row[:, None] * (2 * F)
        g = tl.load(h_ptr + offset + f[None, :], mask=mask, other=0.0)
        u = tl.load(h_ptr + offset + F + f[None, :], mask=mask, other=0.0)
    else:
        column = 2 * first + tl.arange(0, 2 * BLOCK)
        pair = tl.load(
            h_ptr + row[:, None] * (2 * F) + column[None, :],
            mask=in_rows[:, None] & (column < 2 * F)[None, :],
            other=0.0,
        )
        g, u = tl.split(tl.reshape(pair, (pair.shape[0], BLOCK, 2)))
    return g.to(tl.float32), u.to(tl.float32)


@triton.jit
def _block(N, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a program of a grid of rows and columns, its first column, where its numbers lie, and which are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    f = first + tl.arange(0, BLOCK)
    return row, first, row[:, None] * F + f[None, :], (row < N)[:, None] & (f < F)[None, :]


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    h_ptr,
    a_ptr,
    N,
    F,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_UP: tl.constexpr,
    IS_CONCATENATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of rows and columns."""
    row, first, at, mask = _block(N, F, ROWS, BLOCK)
    g, u = _load_gate_up(h_ptr, row, row < N, first, F, HAS_UP, IS_CONCATENATED, BLOCK)
    a = GATE(g, u, ALPHA, LIMIT)
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    h_ptr,
    da_ptr,
    weight_ptr,
    row_slot_ptr,
    dh_ptr,
    a_ptr,
    dweight_ptr,
    N,
    F,
    GRAD: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_UP: tl.constexpr,
    IS_CONCATENATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of rows; it walks their columns. `a` may lie where `da` lay, and `dh` where `h` lay."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < N
    slot = tl.load(row_slot_ptr + row, mask=in_rows, other=0).to(tl.int64)
    weight = tl.load(weight_ptr + slot, mask=in_rows, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)
        mask = in_rows[:, None] & (f < F)[None, :]
        g, u = _load_gate_up(h_ptr, row, in_rows, first, F, HAS_UP, IS_CONCATENATED, BLOCK)
        da = tl.load(da_ptr + row[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        a, dg, du = GRAD(g, u, da, ALPHA, LIMIT)
        dweight += tl.sum(a * da, axis=1)
        tl.debug_barrier()  # another thread may write over what one has still to read
        dg = (dg * weight[:, None]).to(dh_ptr.dtype.element_ty)
        du = (du * weight[:, None]).to(dh_ptr.dtype.element_ty)
        tl.store(a_ptr + row[:, None] * F + f[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)
        offset = row[:, None] * (2 * F)
        if not HAS_UP:
            tl.store(dh_ptr + row[:, None] * F + f[None, :], dg, mask=mask)
        elif IS_CONCATENATED:
            tl.store(dh_ptr + offset + f[None, :], dg, mask=mask)
            tl.store(dh_ptr + offset + F + f[None, :], du, mask=mask)
        else:
            pair = tl.reshape(tl.join(dg, du), (ROWS, 2 * BLOCK))
            column = 2 * first + tl.arange(0, 2 * BLOCK)
            tl.store(dh_ptr + offset + column[None, :], pair, mask=in_rows[:, None] & (column < 2 * F)[None, :])
    tl.store(dweight_ptr + slot, dweight, mask=in_rows)


@triton.jit(do_not_specialize=["N"])
def _plain_backward_kernel(
    h_ptr,
    da_ptr,
    dh_ptr,
    N,
    F,
    GRAD: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_UP: tl.constexpr,
    IS_CONCATENATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of rows and columns, of two halves. `a` comes where `da` lay, `dh` maybe where `h` lay."""
    row, first, at, mask = _block(N, F, ROWS, BLOCK)
    g, u = _load_gate_up(h_ptr, row, row < N, first, F, HAS_UP, IS_CONCATENATED, BLOCK)
    a, dg, du = GRAD(g, u, tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32), ALPHA, LIMIT)
    tl.store(da_ptr + at, a.to(da_ptr.dtype.element_ty), mask=mask)
    at += row[:, None] * F  # a row of `h` is twice as long
    tl.store(dh_ptr + at, dg.to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + at + F, du.to(dh_ptr.dtype.element_ty), mask=mask)


def _constants(gate: GateKernel) -> dict[str, Any]:
    return {
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "HAS_UP": gate.has_up,
        "IS_CONCATENATED": gate.is_concatenated,
        "ROWS": _ROWS,
        "BLOCK": _BLOCK,
    }


def gate_forward(h_NG: Tensor, gate: GateKernel) -> Tensor:
    """`a_NF`, in the dtype of `h_NG`, which is contiguous."""
    num_rows, width = h_NG.shape[0], h_NG.shape[1] // (2 if gate.has_up else 1)
    a_NF = h_NG.new_empty((num_rows, width))
    if num_rows:
        grid = (ceil_div(num_rows, _ROWS), ceil_div(width, _BLOCK), 1)
        constants = {"GATE": gate.function} | _constants(gate)
        launch(_forward_kernel, grid, (h_NG, a_NF), (num_rows,), (width,), constants, num_warps=4)
    return a_NF


def gate_backward(
    h_NG: Tensor,
    da_NF: Tensor,
    weight_TK: Tensor,
    row_slot_N: Tensor,
    gate: GateKernel,
    *,
    overwrites: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`a_NF` (written where `da_NF` lay), `dh_NG` and `⟨a, da⟩` of every slot, `(T, K)` float32.

    Args:
        h_NG: contiguous.
        da_NF: the gradient of `a_NF` before the router's weight; contiguous; overwritten.
        weight_TK: the router's weights, contiguous; they multiply `dh_NG`.
        row_slot_N: the slot `t·K + k` of each row, int32.
        gate: the device functions.
        overwrites: write `dh_NG` where `h_NG` lay.
    """
    num_rows, width = da_NF.shape
    dh_NG = h_NG if overwrites else torch.empty_like(h_NG)
    dweight_TK = torch.empty_like(weight_TK, dtype=torch.float32)
    if num_rows:
        tensors = (h_NG, da_NF, weight_TK, row_slot_N, dh_NG, da_NF, dweight_TK)
        constants = {"GRAD": gate.grad} | _constants(gate)
        grid = (ceil_div(num_rows, _ROWS), 1, 1)
        launch(_backward_kernel, grid, tensors, (num_rows,), (width,), constants, num_warps=4)
    return da_NF, dh_NG, dweight_TK


def plain_gate_backward(h_NG: Tensor, da_NF: Tensor, gate: GateKernel, *, overwrites: bool) -> tuple[Tensor, Tensor]:
    """`a_NF` (written where `da_NF` lay) and `dh_NG`, of a gate of two halves without a router.

    Args:
        h_NG, da_NF: contiguous.
        gate: the device functions.
        overwrites: write `dh_NG` where `h_NG` lay.
    """
    assert gate.has_up
    assert gate.is_concatenated
    num_rows, width = da_NF.shape
    dh_NG = h_NG if overwrites else torch.empty_like(h_NG)
    if num_rows:
        constants = {"GRAD": gate.grad} | _constants(gate)
        grid = (ceil_div(num_rows, _ROWS), ceil_div(width, _BLOCK), 1)
        launch(_plain_backward_kernel, grid, (h_NG, da_NF, dh_NG), (num_rows,), (width,), constants, num_warps=4)
    return da_NF, dh_NG
