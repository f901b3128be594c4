"""Attention's backward without atomics: in two rounds, with the gradient of the scores in between.

FlashAttention's backward adds to `dQ` from every block of keys; with heads of 256 the sums of a block of keys and of one
of queries do not fit the registers together, and adding `dQ` up in memory bounds it. Here the first round walks the
queries of each block of keys, sums `dV`, and writes the gradient of the scores, `dS`, in 16 bits. In the second `dK =
dSᵀQ` and `dQ = dS K` are plain products of triangular matrices. That is five products as in FlashAttention, each sum is
one program's, in order, so results are equal bit by bit, and `dS` costs some 5 % of the time to write and read twice.
It is held for some heads at a time and, where the context is long, for some queries; see `attention/backward.py`.

These are the kernels in plain Triton: any target, and the tested twins of the ones in Gluon (`attention_hopper.py`,
`attention_products_hopper.py`). Source of the equations: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.

Shape letters: `T` rows of a sample · `H` heads of queries, of some of the heads only · `J` of keys, each shared by
`H/J` of those · `D` width of a head.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import RowBlocks, ceil_div, launch, next_power_of_2

LOG2_E = 1.4426950408889634
KEYS = 32  # of a block, in plain Triton
_SUMMED = 4096  # numbers that a program multiplies and sums


class Part(NamedTuple):
    """Queries of some heads, and the gradient of their scores.

    Args:
        ds: `(heads · rows, pitch)` by key and query; of each head. What lies above the diagonal is folded under it, see
            `place`. In the dtype of the queries, its contents of no matter.
        first, end: queries; the first is a multiple of `keys`.
        keys: of a block.
    """

    ds: Tensor
    first: int
    end: int
    keys: int

    @property
    def num_blocks(self) -> int:
        """Of keys that these queries attend to."""
        return ceil_div(self.end, self.keys)

    def sizes(self, num_heads: int, num_query_heads: int, length: int) -> tuple[int, ...]:
        """What kernels are told: the last two, the pitch of `ds` and its rows of a head, are in blocks."""
        rows = len(self.ds) // num_query_heads
        return self.first // self.keys, self.end, num_heads, length, self.ds.shape[1] // self.keys, rows // self.keys


def scratch_shape(num_heads: int, length: int, num_queries: int, keys: int) -> tuple[int, int]:
    """Of `Part.ds`, which is large enough for each part of a sample of so many rows, at so many queries a part."""
    last = (length - 1) // num_queries * num_queries
    rows = last + ceil_div(ceil_div(length - last, keys), 2) * keys
    return num_heads * rows, num_queries + keys


@triton.jit
def place(block, first_block, num_diagonal, KEYS: tl.constexpr):
    """Where `ds` holds a block of keys: its row, and what added to a query is its column.

    Of the blocks on the diagonal the later half, whose rows are short, lies where rows of the earlier half do not reach.
    """
    mirrored = first_block + num_diagonal - 1 - (block - first_block)
    is_folded = block > mirrored
    row = (mirrored if is_folded else block) * KEYS
    return row, (-block if is_folded else 1 - first_block) * KEYS


@triton.jit(do_not_specialize=["T"])
def _row_sums_kernel(
    x_ptr, y_ptr, sums_ptr, T, x_row, x_head, y_row, y_head, sums_head, D, ROWS: tl.constexpr, BD: tl.constexpr
):
    """One program a block of rows of a head."""
    row, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    column = tl.arange(0, BD)
    mask = (row < T)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + head * x_head + row[:, None] * x_row + column[None, :], mask=mask, other=0.0)
    y = tl.load(y_ptr + head * y_head + row[:, None] * y_row + column[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + head.to(tl.int64) * sums_head + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), row < T)


@triton.jit
def _rows(ptr, row, head, T, row_stride, head_stride, D: tl.constexpr, BD: tl.constexpr):
    """Some rows of a head."""
    column = tl.arange(0, BD)
    mask = (row < T)[:, None] & (column < D)[None, :]
    at = head.to(tl.int64) * head_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _write(
    sum_ptr, out_ptr, total, row, head, T, has_before, sum_row, sum_head, out_row, out_head, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Some rows of a head, with what earlier parts summed."""
    column = tl.arange(0, BD)
    mask = (row < T)[:, None] & (column < D)[None, :]
    row, head = row.to(tl.int64)[:, None], head.to(tl.int64)
    if has_before:
        total += tl.load(sum_ptr + head * sum_head + row * sum_row + column[None, :], mask=mask, other=0.0)
    at = out_ptr + head * out_head + row * out_row + column[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_block", "end", "num_heads", "T", "pitch_blocks", "rows_blocks"])
def _values_kernel(
    ds_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, sum_ptr, dv_ptr,
    first_block, end, num_heads, T, pitch_blocks, rows_blocks,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, delta_head, sum_row, sum_head, dv_row,
    dv_head, scale,
    D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One program a block of keys of a head; those with most queries first."""
    block, kv_head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    ds_row, ds_shift = place(block, first_block, tl.cdiv(end, KEYS) - first_block, KEYS)
    key = block * KEYS + tl.arange(0, KEYS)
    k = _rows(k_ptr, key, kv_head, T, k_row, k_head, D, BD)
    v = _rows(v_ptr, key, kv_head, T, v_row, v_head, D, BD)
    dv = tl.zeros((KEYS, BD), dtype=tl.float32)
    first = tl.maximum(block, first_block) * KEYS
    num_tiles = tl.cdiv(end - first, QUERIES)
    for step in range(GROUP * num_tiles):
        head = kv_head * GROUP + step // num_tiles
        query = first + step % num_tiles * QUERIES + tl.arange(0, QUERIES)
        q = _rows(q_ptr, query, head, T, q_row, q_head, D, BD)
        dout = _rows(dout_ptr, query, head, T, dout_row, dout_head, D, BD)
        lse = tl.load(lse_ptr + head.to(tl.int64) * lse_head + query, mask=query < T, other=0.0)
        delta = tl.load(delta_ptr + head.to(tl.int64) * delta_head + query, mask=query < T, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(scores * scale - lse[None, :] * 1.4426950408889634)
        p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(ds_ptr.dtype.element_ty)
        row = (head.to(tl.int64) * rows_blocks * KEYS + ds_row + tl.arange(0, KEYS)) * pitch_blocks * KEYS
        tl.store(ds_ptr + row[:, None] + (query + ds_shift)[None, :], ds)
    _write(
        sum_ptr, dv_ptr, dv, key, kv_head, T, block < first_block, sum_row, sum_head, dv_row, dv_head, D, BD
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_block", "end", "num_heads", "T", "pitch_blocks", "rows_blocks"])
def _products_kernel(
    ds_ptr, x_ptr, sum_ptr, out_ptr,
    first_block, end, num_heads, T, pitch_blocks, rows_blocks,
    x_row, x_head, sum_row, sum_head, out_row, out_head, scale,
    D: tl.constexpr, BD: tl.constexpr, OF_QUERIES: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """One program a block of rows of a head; those with most to sum first."""
    num_blocks = tl.cdiv(end, KEYS)
    block, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    if OF_QUERIES:
        block = num_blocks - 1 - block
        first = 0
        num_tiles = (block + 1) * (KEYS // DEPTH)
        num_steps = num_tiles
    else:
        first = tl.maximum(block, first_block) * KEYS
        num_tiles = tl.cdiv(end - first, DEPTH)
        num_steps = GROUP * num_tiles
    row = block * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((KEYS, BD), dtype=tl.float32)
    for step in range(num_steps):
        at = first + step % num_tiles * DEPTH + tl.arange(0, DEPTH)
        if OF_QUERIES:
            query_head, x_head_at = head, head // GROUP
            key, query = at, row
            key_block = step * DEPTH // KEYS
        else:
            query_head = head * GROUP + step // num_tiles
            x_head_at = query_head
            key, query = row, at
            key_block = block
        ds_row, ds_shift = place(key_block, first_block, num_blocks - first_block, KEYS)
        ds_row = query_head.to(tl.int64) * rows_blocks * KEYS + ds_row + key - key_block * KEYS
        places = ds_row * (pitch_blocks * KEYS)
        if OF_QUERIES:
            ds = tl.load(ds_ptr + places[None, :] + (query + ds_shift)[:, None], mask=(query < end)[:, None], other=0.0)
        else:
            ds = tl.load(ds_ptr + places[:, None] + (query + ds_shift)[None, :])
        x = _rows(x_ptr, at, x_head_at, T, x_row, x_head, D, BD)
        total = tl.dot(ds, x, total, input_precision="ieee")
    has_before = (not OF_QUERIES) & (block < first_block)
    _write(
        sum_ptr, out_ptr, total * scale, row, head, T, has_before, sum_row, sum_head, out_row, out_head, D, BD
    )  # fmt: skip


def row_sums(x_THD: Tensor, y_THD: Tensor) -> Tensor:
    """`⟨x, y⟩` of each row, `(H, T)` in float32; rows begin at multiples of 16 bytes. In any strides but the last."""
    length, num_heads, width = x_THD.shape
    sums = torch.empty((num_heads, ceil_div(length, 4) * 4), dtype=torch.float32, device=x_THD.device)
    blocks = RowBlocks.of(length, width, _SUMMED)
    launch(
        _row_sums_kernel,
        (blocks.grid[0], num_heads, 1),
        (x_THD, y_THD, sums),
        (length,),
        (*x_THD.stride()[:2], *y_THD.stride()[:2], sums.stride(0), width),
        {"ROWS": blocks.rows, "BD": blocks.columns},
        num_warps=4,
    )
    return sums[:, :length]


def values(
    part: Part,
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJD: Tensor,
    dout_THD: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    sum_TJD: Tensor | None,
    dv_TJD: Tensor,
    scale: float,
) -> None:
    """Write `dv` and `part.ds`.

    Args:
        part: whose queries are walked.
        q_THD, k_TJD, v_TJD, dout_THD: in any strides but the last.
        lse_HT: of scaled scores, natural, float32.
        delta_HT: `⟨dout, out⟩`, float32.
        sum_TJD: what earlier parts have summed, in float32; None if there are none. `dv` may lie there.
        dv_TJD: of keys before `part.end`, in its dtype.
        scale: of scores.
    """
    length, num_heads, width = k_TJD.shape
    total = dv_TJD if sum_TJD is None else sum_TJD
    tensors = (part.ds, q_THD, k_TJD, v_TJD, dout_THD, lse_HT, delta_HT, total, dv_TJD)
    strides = [stride for x in tensors[1:] for stride in x.stride()[: x.dim() - 1]]
    launch(
        _values_kernel,
        (part.num_blocks * num_heads, 1, 1),
        tensors,
        part.sizes(num_heads, q_THD.shape[1], length),
        (*strides, scale * LOG2_E),
        {
            "D": width,
            "BD": max(16, next_power_of_2(width)),
            "GROUP": q_THD.shape[1] // num_heads,
            "KEYS": part.keys,
            "QUERIES": part.keys // 2,
        },
        num_warps=4,
    )


def products(
    part: Part, x_TXD: Tensor, sum_TYD: Tensor | None, out_TYD: Tensor, scale: float, *, of_queries: bool, group: int
) -> None:
    """Write `scale · dS x`, for queries, or the sum of `scale · dSᵀ x` over the heads that share keys, for keys.

    Args:
        part: with the gradient of the scores written.
        x_TXD: keys for queries and queries for keys, in any strides but the last.
        sum_TYD: as for `values`; None for queries.
        out_TYD: of queries of the part, or of keys before its end; other rows stay.
        scale: of scores.
        of_queries: whether `out` is of queries.
        group: heads of queries that share one of keys.
    """
    length, num_heads, width = out_TYD.shape
    total = out_TYD if sum_TYD is None else sum_TYD
    tensors = (part.ds, x_TXD, total, out_TYD)
    num_blocks = part.num_blocks - (part.first // part.keys if of_queries else 0)
    launch(
        _products_kernel,
        (num_blocks * num_heads, 1, 1),
        tensors,
        part.sizes(num_heads, num_heads * (1 if of_queries else group), length),
        (*[stride for x in tensors[1:] for stride in x.stride()[:2]], scale),
        {
            "D": width,
            "BD": max(16, next_power_of_2(width)),
            "OF_QUERIES": of_queries,
            "GROUP": group,
            "KEYS": part.keys,
            "DEPTH": part.keys // 2,
        },
        num_warps=4,
    )
