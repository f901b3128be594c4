"""Grouped linear with LoRA, portable: every row times the matrix of its own expert, the low-rank step in the same sum.

    y[n] = x[n] W[e(n)] + mid[n] B[e(n)] (+ bias[e(n)])

`mid` and `B` are read as more columns of `x` and more rows of `W`: the K loop runs `⌈I/BK⌉ + ⌈R/BK⌉` times and selects
its pointers, so LoRA costs its own products and nothing else. A separate `dot` after the loop costs 17 to 25 % on an
H200, because its loads do not overlap with anything. Pointers and `cp.async`: any card from Turing on, and the CPU
interpreter. It is the tested twin of the Hopper kernel.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.device import num_programs
from expertune.kernels.launch import ceil_div, launch
from expertune.kernels.tuning.configs import LinearConfig, LinearShape
from expertune.kernels.tuning.lookup import TUNED
from expertune.shapes import Tiles


@triton.jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    mid_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    ends_ptr,
    I,  # noqa: E741
    O,  # noqa: E741
    R,
    w_expert_stride,
    w_stride,
    b_expert_stride,
    b_stride,
    IS_K_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Persistent: each program walks tiles of `BM` rows by `BN` columns, expert by expert, columns fastest."""
    num_column_tiles = tl.cdiv(O, BN)
    num_base_steps = tl.cdiv(I, BK)
    num_steps = num_base_steps + tl.cdiv(R, BK)
    total = tl.load(num_tiles_ptr) * num_column_tiles
    for item in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        tile = item // num_column_tiles
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        first_row = tl.load(tile_row_ptr + tile)
        end = tl.load(ends_ptr + expert)
        row = first_row + tl.arange(0, BM)
        # rows beyond the expert's end are computed from its last row and not stored: cheaper than a masked load
        safe_row = tl.minimum(row, end - 1).to(tl.int64)
        column = (item % num_column_tiles) * BN + tl.arange(0, BN)
        in_width = column < O
        k = tl.arange(0, BK)
        acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(0, num_steps):
            is_lora = step >= num_base_steps
            first_k = tl.where(is_lora, step - num_base_steps, step) * BK
            depth = tl.multiple_of(tl.where(is_lora, R, I), 8)
            left_ptr = tl.multiple_of(tl.where(is_lora, mid_ptr, x_ptr), 16)
            weight_ptr = tl.where(is_lora, b_ptr + expert * b_expert_stride, w_ptr + expert * w_expert_stride)
            weight_ptr = tl.multiple_of(weight_ptr, 16)
            stride = tl.multiple_of(tl.where(is_lora, b_stride, w_stride), 8)
            in_depth = first_k + k < depth
            left = tl.load(
                left_ptr + safe_row[:, None] * depth + (first_k + k)[None, :], mask=in_depth[None, :], other=0.0
            )
            if IS_K_CONTIGUOUS:
                offset = (first_k + k)[:, None] + column[None, :].to(tl.int64) * stride
            else:
                offset = (first_k + k)[:, None].to(tl.int64) * stride + column[None, :]
            right = tl.load(weight_ptr + offset, mask=in_depth[:, None] & in_width[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * O + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
        offset = row[:, None].to(tl.int64) * O + column[None, :]
        tl.store(y_ptr + offset, acc.to(y_ptr.dtype.element_ty), mask=(row < end)[:, None] & in_width[None, :])


def linear(
    x_NI: Tensor,
    w_EIO: Tensor,
    tiles: Tiles,
    *,
    mid_NR: Tensor | None = None,
    b_ERO: Tensor | None = None,
    bias_EO: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """`y_NO`, in the dtype of `x_NI`, summed in float32.

    Args:
        x_NI: rows sorted by expert, contiguous.
        w_EIO: a view of the base weights whose last or last but one dimension is contiguous.
        tiles: where each expert's rows lie.
        mid_NR: the low-rank inputs, contiguous.
        b_ERO: the low-rank matrices, contiguous along the same dimension as `w_EIO`.
        bias_EO: contiguous, any floating dtype.
        config: how to cut the product; None takes what was tuned for this shape, or else the shipped one.
    """
    num_rows, width = x_NI.shape
    width_out = w_EIO.shape[2]
    y_NO = x_NI.new_empty((num_rows, width_out))
    if num_rows == 0:
        return y_NO
    is_k_contiguous = w_EIO.stride(1) == 1
    along = 2 if is_k_contiguous else 1
    low, high, rank = x_NI, w_EIO, 0
    if mid_NR is not None and b_ERO is not None:
        low, high, rank = mid_NR, b_ERO, mid_NR.shape[1]
    assert high.stride(3 - along) == 1 == w_EIO.stride(3 - along), "weights and factors lie along different dimensions"
    if config is None:
        shape = LinearShape(width, width_out, rank, is_k_contiguous)
        config = TUNED.config(shape, x_NI.device, x_NI.dtype, num_rows, w_EIO.shape[0])
    most = tiles.expert.shape[0] * ceil_div(width_out, config.columns)
    bias = y_NO if bias_EO is None else bias_EO
    launch(
        _linear_kernel,
        (min(most, num_programs(x_NI.device)), 1, 1),
        (x_NI, w_EIO, low, high, bias, y_NO, tiles.expert, tiles.row, tiles.count, tiles.ends_E),
        (),
        (width, width_out, rank, w_EIO.stride(0), w_EIO.stride(along), high.stride(0), high.stride(along)),
        {
            "IS_K_CONTIGUOUS": is_k_contiguous,
            "HAS_BIAS": bias_EO is not None,
            "BM": tiles.rows,
            "BN": config.columns,
            "BK": config.depth,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y_NO
