"""Outer: sums of outer products over each expert's rows, `out[e] = Σ weight[n] · narrow[n] ⊗ wide[n]`.

The gradients of a projection's two LoRA factors, in one launch. One program owns an expert and a block of a wide side
and walks that expert's rows in order. The rank is the N side of the product, because Hopper's matrix unit has at least
64 on the M side. The wide rows may be read by their token, straight from `(T, I)`: at these widths they come from L2,
and reading them there beats a gathered copy (39 against 45 µs at 4K tokens on an H200).

Where one expert has many times the rows of the mean, its programs would work on when all others are done. So its rows
are cut into chunks, each walked by a program of its own, whose sums a second launch adds up in order: no atomics, and
the same bits every run. Any card from Turing on, and the CPU interpreter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch, next_power_of_2

_LEAST_CHUNK = 1024  # rows
_CHUNK_OF_MEAN = 4  # experts' rows
_MOST_RANK = 256
_ADDED = 1024  # numbers that a program adds up


class Sum(NamedTuple):
    """One sum of outer products.

    Args:
        wide: `(N, I)` sorted by expert, or with `by_token` `(T, I)`; contiguous.
        narrow_NR: contiguous.
        out: `(E, R, I)`, or with `is_wide_first` `(E, I, R)`; contiguous, any floating dtype.
        by_token: whether a row of `wide` is a token.
        is_wide_first: how `out` lies.
        adds: whether it is added to what `out` holds, instead of written.
    """

    wide: Tensor
    narrow_NR: Tensor
    out: Tensor
    by_token: bool = False
    is_wide_first: bool = False
    adds: bool = False


class _Cut(NamedTuple):
    """How experts' rows are cut into chunks.

    Args:
        rows: of a chunk, at most.
        most_cut: how many experts can have more rows.
        parts: how many chunks these can have in all; 0 if nothing is cut.
    """

    rows: int
    most_cut: int
    parts: int

    @classmethod
    def of(cls, num_rows: int, num_experts: int, top_k: int, rank: int) -> "_Cut":
        """Chunks of some times the mean expert's rows; none where no expert, which has a token but once, can have more.

        Sums of a higher rank are of other products, whose parts would take too much memory.
        """
        rows = max(_LEAST_CHUNK, _CHUNK_OF_MEAN * ceil_div(num_rows, num_experts))
        if rank > _MOST_RANK or num_rows // max(top_k, 1) <= rows:
            return cls(rows, 0, 0)
        return cls(rows, num_rows // rows, 2 * num_rows // rows)


@triton.jit
def _sum_rows(
    wide_ptr,
    narrow_ptr,
    weight_ptr,
    row_slot_ptr,
    out_ptr,
    part_ptr,
    is_part,
    start,
    end,
    block,
    I,  # noqa: E741
    R,
    top_k,
    BY_TOKEN: tl.constexpr,
    IS_WIDE_FIRST: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    ADDS: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
):
    """A block of the sum over some rows, `BN` at a time; to `part_ptr` if they are but a part of an expert's."""
    i = block * BI + tl.arange(0, BI)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros((BI, BR), tl.float32)
    for first in tl.range(start, end, BN):
        row = first + tl.arange(0, BN)
        in_expert = row < end
        source = row
        if BY_TOKEN or IS_WEIGHTED:
            slot = tl.load(row_slot_ptr + row, mask=in_expert, other=0)
            if BY_TOKEN:
                source = slot // top_k
        wide = tl.load(
            wide_ptr + source.to(tl.int64)[:, None] * I + i[None, :],
            mask=in_expert[:, None] & (i < I)[None, :],
            other=0.0,
        )
        narrow = tl.load(
            narrow_ptr + row.to(tl.int64)[:, None] * R + rank[None, :],
            mask=in_expert[:, None] & (rank < R)[None, :],
            other=0.0,
        )
        if IS_WEIGHTED:
            weight = tl.load(weight_ptr + slot, mask=in_expert, other=0.0).to(tl.float32)
            narrow = (narrow * weight[:, None]).to(narrow.dtype)
        acc = tl.dot(tl.trans(wide), narrow, acc, input_precision="ieee")
    if IS_WIDE_FIRST:
        offset = i.to(tl.int64)[:, None] * R + rank[None, :]
    else:
        offset = i.to(tl.int64)[:, None] + rank[None, :] * I
    mask = (i < I)[:, None] & (rank < R)[None, :]
    if is_part:
        tl.store(part_ptr + offset, acc, mask=mask)
    else:
        if ADDS:
            acc += tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chunks(ends_ptr, chunk_rows, E, BE: tl.constexpr):
    """Of each expert where its rows start and end, into how many chunks they are cut, and those that are a part."""
    e = tl.arange(0, BE)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    chunks = tl.where(e < E, tl.maximum(tl.cdiv(end - start, chunk_rows), 1), 0)
    return e, start, end, chunks, tl.where(chunks > 1, chunks, 0)


@triton.jit(do_not_specialize=["chunk_rows"])
def _outer_kernel(
    wide0_ptr,
    narrow0_ptr,
    out0_ptr,
    wide1_ptr,
    narrow1_ptr,
    out1_ptr,
    weight_ptr,
    row_slot_ptr,
    ends_ptr,
    part_ptr,
    chunk_rows,
    I0,
    R0,
    I1,
    R1,
    top_k,
    E,
    BY_TOKEN0: tl.constexpr,
    IS_WIDE_FIRST0: tl.constexpr,
    ADDS0: tl.constexpr,
    BY_TOKEN1: tl.constexpr,
    IS_WIDE_FIRST1: tl.constexpr,
    ADDS1: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    IS_CUT: tl.constexpr,
    BN: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """One program per chunk of an expert, block of a wide side (the first sum's, then the second's) and of ranks."""
    number = tl.program_id(1)
    if IS_CUT:
        e, starts, ends, chunks, parts = _chunks(ends_ptr, chunk_rows, E, BE)
        expert = tl.sum(tl.where(tl.cumsum(chunks, 0) <= number, 1, 0), axis=0)
        if expert >= E:
            return
        number -= tl.sum(tl.where(e < expert, chunks, 0), axis=0)  # of the chunk within its expert
        start = tl.sum(tl.where(e == expert, starts, 0), axis=0) + number * chunk_rows
        end = tl.minimum(tl.sum(tl.where(e == expert, ends, 0), axis=0), start + chunk_rows)
        is_part = tl.sum(tl.where(e == expert, parts, 0), axis=0) > 0
        part_ptr += (tl.sum(tl.where(e < expert, parts, 0), axis=0) + number).to(tl.int64) * (R0 * I0 + R1 * I1)
    else:
        expert = number
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        is_part = False
    block = tl.program_id(0)
    num_blocks0 = tl.cdiv(I0, BI)
    if block < num_blocks0:
        out0_ptr += expert.to(tl.int64) * R0 * I0
        _sum_rows(
            wide0_ptr, narrow0_ptr, weight_ptr, row_slot_ptr, out0_ptr, part_ptr, is_part, start, end, block,
            I0, R0, top_k, BY_TOKEN0, IS_WIDE_FIRST0, IS_WEIGHTED, ADDS0, BN, BI, BR,
        )  # fmt: skip
    else:
        out1_ptr += expert.to(tl.int64) * R1 * I1
        _sum_rows(
            wide1_ptr, narrow1_ptr, weight_ptr, row_slot_ptr, out1_ptr, part_ptr + R0 * I0, is_part, start, end,
            block - num_blocks0, I1, R1, top_k, BY_TOKEN1, IS_WIDE_FIRST1, IS_WEIGHTED, ADDS1, BN, BI, BR,
        )  # fmt: skip


@triton.jit
def _add_parts(part_ptr, out_ptr, at, size, stride, num_parts, ADDS: tl.constexpr):
    """Some numbers of an expert's sum."""
    mask = at < size
    acc = tl.zeros(at.shape, tl.float32)
    for number in range(num_parts):
        acc += tl.load(part_ptr + number * stride + at, mask=mask, other=0.0)
    if ADDS:
        acc += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunk_rows"])
def _add_parts_kernel(
    part_ptr, out0_ptr, out1_ptr, ends_ptr, chunk_rows, size0, size1, E,
    ADDS0: tl.constexpr, ADDS1: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of numbers (the first sum's, then the second's) and expert that is cut."""
    e, _, _, _, parts = _chunks(ends_ptr, chunk_rows, E, BE)
    is_cut = tl.where(parts > 0, 1, 0)
    expert = tl.sum(tl.where(tl.cumsum(is_cut, 0) <= tl.program_id(1), 1, 0), axis=0)
    if expert >= E:
        return
    num_parts = tl.sum(tl.where(e == expert, parts, 0), axis=0)
    stride = (size0 + size1).to(tl.int64)
    part_ptr += tl.sum(tl.where(e < expert, parts, 0), axis=0) * stride
    block = tl.program_id(0)
    num_blocks0 = tl.cdiv(size0, BLOCK)
    if block < num_blocks0:
        at = block * BLOCK + tl.arange(0, BLOCK)
        _add_parts(part_ptr, out0_ptr + expert.to(tl.int64) * size0, at, size0, stride, num_parts, ADDS0)
    else:
        at = (block - num_blocks0) * BLOCK + tl.arange(0, BLOCK)
        _add_parts(part_ptr + size0, out1_ptr + expert.to(tl.int64) * size1, at, size1, stride, num_parts, ADDS1)


def outer(
    first: Sum,
    second: Sum | None,
    ends_E: Tensor,
    *,
    row_slot_N: Tensor,
    top_k: int,
    weight_TK: Tensor | None = None,
) -> None:
    """Write every expert's sums, or add them to what is there; zero for an expert without rows.

    Args:
        first, second: what is summed; one or two of the same number of ranks.
        ends_E: int32, where each expert's rows end.
        row_slot_N: the slot `t·K + k` of each row, int32.
        top_k: `K`.
        weight_TK: the router's weights, contiguous; each multiplies its row of both sums.
    """
    sums = (first, second or first)
    widths = [s.wide.shape[1] for s in sums]
    ranks = [s.narrow_NR.shape[1] for s in sums]
    block_rank = min(64, max(16, next_power_of_2(max(ranks))))
    is_narrow = first.wide.itemsize < torch.float32.itemsize  # float32 is multiplied from registers, which hold less
    block = min(128 if is_narrow else 64, max(16, next_power_of_2(max(widths))))
    num_blocks = ceil_div(widths[0], block) + (ceil_div(widths[1], block) if second else 0)
    cut = _Cut.of(row_slot_N.shape[0], ends_E.shape[0], top_k, max(ranks))
    sizes = [rank * width for rank, width in zip(ranks, widths, strict=True)]
    part_PS = first.out.new_empty((cut.parts, sum(sizes)), dtype=torch.float32) if cut.parts else ends_E
    block_experts = next_power_of_2(ends_E.shape[0])
    launch(
        _outer_kernel,
        (num_blocks, ends_E.shape[0] + cut.most_cut, ceil_div(max(ranks), block_rank)),
        (
            *(tensor for s in sums for tensor in (s.wide, s.narrow_NR, s.out)),
            weight_TK if weight_TK is not None else first.narrow_NR,
            row_slot_N,
            ends_E,
            part_PS,
        ),
        (cut.rows,),
        (widths[0], ranks[0], widths[1], ranks[1], max(top_k, 1), ends_E.shape[0]),
        {
            "BY_TOKEN0": sums[0].by_token,
            "IS_WIDE_FIRST0": sums[0].is_wide_first,
            "ADDS0": sums[0].adds,
            "BY_TOKEN1": sums[1].by_token,
            "IS_WIDE_FIRST1": sums[1].is_wide_first,
            "ADDS1": sums[1].adds,
            "IS_WEIGHTED": weight_TK is not None,
            "IS_CUT": cut.parts > 0,
            "BN": 64 if is_narrow else 32,
            "BI": block,
            "BR": block_rank,
            "BE": block_experts,
        },
        num_warps=8 if block >= 64 else 4,
        num_stages=3,
    )
    if not cut.parts:
        return
    launch(
        _add_parts_kernel,
        (sum(ceil_div(size, _ADDED) for size in sizes[: 2 if second else 1]), cut.most_cut, 1),
        (part_PS, first.out, sums[1].out, ends_E),
        (cut.rows,),
        (*sizes, ends_E.shape[0]),
        {"ADDS0": first.adds, "ADDS1": sums[1].adds, "BE": block_experts, "BLOCK": _ADDED},
        num_warps=4,
    )
