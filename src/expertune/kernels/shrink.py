"""Shrink: the narrow half of LoRA, `mid[n] = x[n] A[e(n)]ᵀ`, which on its way can copy the tokens to sorted rows.

Any card from Turing on, and the CPU interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch
from expertune.kernels.tuning.configs import ShrinkConfig, ShrinkShape
from expertune.kernels.tuning.lookup import TUNED
from expertune.shapes import Tiles


@triton.jit
def _multiply(
    x_ptr,
    a_ptr,
    mid_ptr,
    rows_ptr,
    row,
    source,
    in_expert,
    rank,
    I,  # noqa: E741
    R,
    a_rank_stride,
    a_stride,
    COPIES: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """One row tile's products with a block of ranks; with `COPIES` also a copy of its rows.

    Triton 3.6 gives a tile that Hopper's matrix unit reads and that is also stored one pipeline stage too few: the copy
    of a later tile would overwrite it. Looking at the sums in every step makes it wait for the product first.
    """
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BR), tl.float32)
    offset = source.to(tl.int64)[:, None] * I
    row_offset = row.to(tl.int64)[:, None] * I
    for first in tl.range(0, I, BK):
        in_width = first + k < I
        inside = in_expert[:, None] & in_width[None, :]
        x = tl.load(x_ptr + offset + (first + k)[None, :], mask=inside, other=0.0)
        if COPIES:
            tl.store(rows_ptr + row_offset + (first + k)[None, :], x, mask=inside)
        a = tl.load(
            a_ptr + rank[None, :] * a_rank_stride + (first + k)[:, None] * a_stride,
            mask=(rank < R)[None, :] & in_width[:, None],
            other=0.0,
        )
        acc = tl.dot(x, a, acc, input_precision="ieee")
        if COPIES:
            acc = tl.where(in_expert[:, None], acc, 0.0)
    offset = row.to(tl.int64)[:, None] * R + rank[None, :]
    tl.store(mid_ptr + offset, acc.to(mid_ptr.dtype.element_ty), mask=in_expert[:, None] & (rank < R)[None, :])


@triton.jit
def _shrink_kernel(
    x_ptr,
    row_slot_ptr,
    a_ptr,
    rows_ptr,
    mid_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    ends_ptr,
    I,  # noqa: E741
    R,
    top_k,
    a_expert_stride,
    a_rank_stride,
    a_stride,
    IS_GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per row tile and block of ranks.

    With `IS_GATHERED` it copies the tile's rows; the blocks of a rank beyond `BR` copy the same (asking which one it is
    would take registers that two more programs need).
    """
    num_blocks = tl.cdiv(R, BR)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if tile < tl.load(num_tiles_ptr):
        expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
        row = tl.load(tile_row_ptr + tile) + tl.arange(0, BM)
        in_expert = row < tl.load(ends_ptr + expert)
        source = row
        if IS_GATHERED:
            source = tl.load(row_slot_ptr + row, mask=in_expert, other=0) // top_k
        rank = block * BR + tl.arange(0, BR)
        a = a_ptr + expert * a_expert_stride
        # fmt: off
        _multiply(x_ptr, a, mid_ptr, rows_ptr, row, source, in_expert, rank, I, R, a_rank_stride, a_stride,
                  IS_GATHERED, BM, BR, BK)
        # fmt: on


def _launch(
    x: Tensor,
    a_ERI: Tensor,
    tiles: Tiles,
    mid_NR: Tensor,
    rows_NI: Tensor,
    row_slot_N: Tensor,
    k: int,
    config: ShrinkConfig | None,
) -> None:
    num_rows, rank = mid_NR.shape
    if num_rows == 0:
        return
    num_experts, _, width = a_ERI.shape
    if config is None:
        shape = ShrinkShape(width, rank, k > 0, a_ERI.stride(2) == 1)
        config = TUNED.config(shape, x.device, x.dtype, num_rows, num_experts)
    block = config.block(rank)
    launch(
        _shrink_kernel,
        (tiles.expert.shape[0] * ceil_div(rank, block), 1, 1),
        (x, row_slot_N, a_ERI, rows_NI, mid_NR, tiles.expert, tiles.row, tiles.count, tiles.ends_E),
        (),
        (width, rank, max(k, 1), *a_ERI.stride()),
        {"IS_GATHERED": k > 0, "BM": tiles.rows, "BR": block, "BK": config.depth},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def gather_shrink(
    x_TD: Tensor,
    a_ERD: Tensor,
    tiles: Tiles,
    row_slot_N: Tensor,
    top_k: int,
    config: ShrinkConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens copied to rows, `(N, D)`, and `mid_NR`, both in the dtype of `x_TD`.

    Args:
        x_TD: contiguous.
        a_ERD: any strides, the dtype of `x_TD`.
        tiles: where each expert's rows lie.
        row_slot_N: the slot `t·K + k` of each row, int32.
        top_k: `K`.
        config: how to cut the product; None takes what was tuned for this shape, or else the shipped one.
    """
    x_ND = x_TD.new_empty((row_slot_N.shape[0], x_TD.shape[1]))
    mid_NR = x_TD.new_empty((row_slot_N.shape[0], a_ERD.shape[1]))
    _launch(x_TD, a_ERD, tiles, mid_NR, x_ND, row_slot_N, top_k, config)
    return x_ND, mid_NR


def shrink(x_NI: Tensor, a_ERI: Tensor, tiles: Tiles, config: ShrinkConfig | None = None) -> Tensor:
    """`mid_NR` of rows that are sorted already, in the dtype of `x_NI`."""
    mid_NR = x_NI.new_empty((x_NI.shape[0], a_ERI.shape[1]))
    _launch(x_NI, a_ERI, tiles, mid_NR, mid_NR, tiles.expert, 0, config)
    return mid_NR
