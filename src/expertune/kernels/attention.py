"""Attention's backward without atomics, by blocks of keys.

FlashAttention's backward adds to `dQ` from every block of keys. With heads of 256 the sums of `dK` and `dV` leave the
registers no room for large blocks, and what is added up in memory bounds it. Here the first round walks the queries of
each block of keys, sums `dV`, and writes the gradient of the scores, `dS`, in 16 bits. In the second
(`attention_products.py`), `dK = dSᵀQ` and `dQ = dS K` are plain products with triangular matrices. That is five
products as in FlashAttention, and each sum is one program's, in order, so two runs give the same bits. `dS` is held for
some heads at a time and, where the context is long, for some queries; see `attention/backward.py`. Of narrow heads the
same walk sums `dK` too and writes nothing else, and `attention_queries.py` forms the scores again for `dQ`; see
`attention/backward_again.py`.

In plain Triton: any target, and the tested twin of the one in Gluon (`attention_hopper.py`). Source of the equations:
FlashAttention-2 (arXiv 2307.08691), section 3.1.2.

A key is attended to by a run of queries: itself and those behind it, as far as its sample and a window reach. So each
block of keys has a last query, and each block of queries a first key; between them each round walks whole blocks.

Shape letters: `T` rows of a sample, or of packed ones · `H` heads of queries, of some of the heads only · `J` of keys,
each shared by `H/J` of those · `D` width of a head · `V` of its values.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.attention_spans import Spans, empty_rows
from expertune.kernels.launch import RowBlocks, ceil_div, launch, next_power_of_2

KEYS = 32  # of a block, in plain Triton
_SUMMED = 4096  # numbers that a program multiplies and sums


class Part(NamedTuple):
    """Queries of some heads, and the gradient of their scores.

    Args:
        ds: `(heads · rows, pitch)` by key and query; of each head. See `place`. In the dtype of the queries, its
            contents of no matter.
        first, end: queries; the first is a multiple of `keys`.
        keys: of a block.
        is_band: whether `ds` has a row a key, and columns for the queries that reach it; else it is folded.
        adds: whether what these queries give is added to every key's sum, and not just to those of keys before them.
        keys_end: keys from there on are left out, a multiple of `keys`; None for none. What is formed of the others is
            added to the sums of queries that come behind it.
    """

    ds: Tensor
    first: int
    end: int
    keys: int
    is_band: bool
    adds: bool
    keys_end: int | None = None

    @classmethod
    def whole(cls, heads: "Heads", keys: int) -> "Part":
        """All queries, where the gradient of their scores is not written: what is in its place stays as it is."""
        return cls(heads.q_THD, 0, len(heads.q_THD), keys, is_band=False, adds=False)

    @property
    def key_blocks(self) -> int:
        """Blocks of keys that these queries attend to, and that are not left out."""
        return ceil_div(self.end if self.keys_end is None else self.keys_end, self.keys)

    def num_programs(self, num_sums: int, *, of_queries: bool) -> int:
        """For so many sums: blocks of these queries, or of keys."""
        query_blocks = ceil_div(self.end, self.keys) - self.first // self.keys
        return (query_blocks if of_queries else self.key_blocks) * num_sums

    def sizes(self, num_heads: int, length: int) -> tuple[int, ...]:
        """What kernels are told; the pitch of `ds` and its rows of a head are in blocks."""
        pitch, rows = self.ds.shape[1] // self.keys, len(self.ds) // num_heads // self.keys
        return self.first // self.keys, self.end, self.key_blocks, num_heads, length, pitch, rows, int(self.adds)


class Heads(NamedTuple):
    """Some heads of queries of a sample, and the keys and values that they share. In any strides but the last.

    Args:
        q_THD, k_TJD, v_TJV: what attended.
        dout_THV: the gradient of what came out.
        lse_HT: the logarithm of the sum of the exponentials of scaled scores, natural, float32.
        delta_HT: `⟨dout, out⟩`, float32.
    """

    q_THD: Tensor
    k_TJD: Tensor
    v_TJV: Tensor
    dout_THV: Tensor
    lse_HT: Tensor
    delta_HT: Tensor

    def of(self, own: slice, shared: slice) -> "Heads":
        """Some of them, with these of keys and values."""
        q, k, v, dout, lse, delta = self
        return Heads(q[:, own], k[:, shared], v[:, shared], dout[:, own], lse[own], delta[own])


class Grads(NamedTuple):
    """Of keys and of values, `(T, sums, D or V)`: each is the sum of what as many heads of queries in a row give."""

    dk: Tensor
    dv: Tensor


def scratch_shape(num_heads: int, length: int, num_queries: int, keys: int, band: int) -> tuple[int, int]:
    """Of `Part.ds`.

    Args:
        num_heads: whose scores it holds.
        length: rows of a sample, or of packed ones.
        num_queries: of a part at most.
        keys: of a block.
        band: columns of a band, which holds all queries; 0 for one that is folded.
    """
    if band:
        return num_heads * ceil_div(length, keys) * keys, band
    last = (length - 1) // num_queries * num_queries
    rows = last + ceil_div(ceil_div(length - last, keys), 2) * keys
    return num_heads * rows, num_queries + keys


@triton.jit
def place(block, first_block, num_diagonal, IS_BAND: tl.constexpr, KEYS: tl.constexpr):
    """Where `ds` holds a block of keys: its row, and what added to a query is its column.

    In a band a block's columns begin with its first key. Folded, columns are those of a square whose upper triangle
    alone is filled: of blocks on the diagonal the later half, whose rows are short, lies where rows of the earlier half
    do not begin.
    """
    mirrored = first_block + num_diagonal - 1 - (block - first_block)
    is_folded = block > mirrored
    row = (mirrored if is_folded else block) * KEYS
    shift = (-block if is_folded else 1 - first_block) * KEYS
    if IS_BAND:
        row = block * KEYS
        shift = -row
    return row, shift


@triton.jit
def last_query(reach_ptr, block, end, T, KEYS: tl.constexpr):
    """Where the queries of a block of keys end: in whole blocks, so that no round reads what the other has not written.

    Keys behind one that a query attends to, up to itself, are attended to by it, or by a query behind it.
    """
    key = tl.minimum((block + 1) * KEYS, T) - 1
    return tl.minimum(tl.cdiv(key + tl.load(reach_ptr + key), KEYS) * KEYS, end)


@triton.jit
def first_key(first_ptr, block, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Where the keys of a block of queries begin, in whole blocks of theirs."""
    return tl.load(first_ptr + block * QUERIES) // KEYS * KEYS


@triton.jit(do_not_specialize=["T"])
def _attention_row_sums_kernel(
    x_ptr, y_ptr, sums_ptr, T, x_row, x_head, y_row, y_head, sums_head, D, ROWS: tl.constexpr, BD: tl.constexpr
):
    """One program a block of rows of a head."""
    row, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BD)
    mask = (row < T)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + head * x_head + row[:, None] * x_row + column[None, :], mask=mask, other=0.0)
    y = tl.load(y_ptr + head * y_head + row[:, None] * y_row + column[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + head * sums_head + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1), row < T)


@triton.jit
def load_rows(ptr, row, head, T, row_stride, head_stride, D: tl.constexpr, BD: tl.constexpr):
    """Some rows of a head."""
    column = tl.arange(0, BD)
    mask = (row < T)[:, None] & (column < D)[None, :]
    at = head.to(tl.int64) * head_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def write(
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


@triton.jit(
    do_not_specialize=["first_block", "end", "_key_blocks", "num_heads", "T", "pitch_blocks", "rows_blocks", "adds"]
)
def _attention_keys_kernel(
    ds_ptr, q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, reach_ptr, sum_ptr, dv_ptr, dk_ptr,
    first_block, end, _key_blocks, num_heads, T, pitch_blocks, rows_blocks, adds,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, delta_head, sum_row, sum_head, out_row,
    out_head, scale,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    IS_BAND: tl.constexpr, SUMS_KEYS: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One program a block of keys of a sum; those of whole samples with most queries first.

    With `SUMS_KEYS` `dK` is summed too, and nothing is written to `ds`.
    """
    num_sums = num_heads // HEADS
    block, own = tl.program_id(0) // num_sums, tl.program_id(0) % num_sums
    ds_row, ds_shift = place(block, first_block, tl.cdiv(end, KEYS) - first_block, IS_BAND, KEYS)
    key = block * KEYS + tl.arange(0, KEYS)
    k = load_rows(k_ptr, key, own * HEADS // GROUP, T, k_row, k_head, D, BD)
    v = load_rows(v_ptr, key, own * HEADS // GROUP, T, v_row, v_head, V, BV)
    dv = tl.zeros((KEYS, BV), dtype=tl.float32)
    dk = tl.zeros((KEYS, BD), dtype=tl.float32)
    first, last = tl.maximum(block, first_block) * KEYS, last_query(reach_ptr, block, end, T, KEYS)
    reach = tl.load(reach_ptr + key, mask=key < T, other=0)
    for of_sum in range(HEADS):
        head = own * HEADS + of_sum
        for start in range(first, last, QUERIES):
            query = start + tl.arange(0, QUERIES)
            q = load_rows(q_ptr, query, head, T, q_row, q_head, D, BD)
            dout = load_rows(dout_ptr, query, head, T, dout_row, dout_head, V, BV)
            lse = tl.load(lse_ptr + head.to(tl.int64) * lse_head + query, mask=query < T, other=0.0)
            delta = tl.load(delta_ptr + head.to(tl.int64) * delta_head + query, mask=query < T, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp(scores * scale - lse[None, :])
            behind = query[None, :] - key[:, None]
            p = tl.where((behind >= 0) & (behind < reach[:, None]), p, 0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            if SUMS_KEYS:
                dk = tl.dot(ds, q, dk, input_precision="ieee")
            else:
                row = (head.to(tl.int64) * rows_blocks * KEYS + ds_row + tl.arange(0, KEYS)) * pitch_blocks * KEYS
                tl.store(ds_ptr + row[:, None] + (query + ds_shift)[None, :], ds)
    has_before = (block < first_block) | (adds > 0)
    write(sum_ptr, dv_ptr, dv, key, own, T, has_before, sum_row, sum_head, out_row, out_head, V, BV)
    if SUMS_KEYS:
        write(dk_ptr, dk_ptr, dk * scale, key, own, T, False, out_row, out_head, out_row, out_head, D, BD)


def padded_width(width: int) -> int:
    """Of a head, as products take it."""
    return max(16, next_power_of_2(width))


def row_sums(x_THD: Tensor, y_THD: Tensor) -> Tensor:
    """`⟨x, y⟩` of each row, `(H, T)` in float32; rows begin at multiples of 16 bytes. In any strides but the last."""
    length, num_heads, width = x_THD.shape
    sums = empty_rows(num_heads, length, dtype=torch.float32, device=x_THD.device)
    blocks = RowBlocks.of(length, width, _SUMMED)
    launch(
        _attention_row_sums_kernel,
        (blocks.grid[0], num_heads, 1),
        (x_THD, y_THD, sums),
        (length,),
        (*x_THD.stride()[:2], *y_THD.stride()[:2], sums.stride(0), width),
        {"ROWS": blocks.rows, "BD": blocks.columns},
        num_warps=4,
    )
    return sums


def values(part: Part, heads: Heads, spans: Spans, sums: Grads | None, grads: Grads, scale: float) -> None:
    """Write `part.ds`, and what heads of queries give `dv`.

    Args:
        part: whose queries are walked.
        heads: all rows of theirs.
        spans: of these rows.
        sums: what has been summed before, in float32; None if nothing has. `grads` may lie there.
        grads: of keys before `part.end`, in their dtype; other rows stay.
        scale: of scores.
    """
    _walk(part, heads, spans, (grads if sums is None else sums).dv, grads, scale)


def keys_and_values(heads: Heads, spans: Spans, grads: Grads, scale: float) -> None:
    """Write what heads of queries give `dk` and `dv`; both in the same strides, and values are as wide as keys.

    Args:
        heads, spans, scale: as for `values`.
        grads: in their dtype.
    """
    _walk(Part.whole(heads, KEYS), heads, spans, grads.dv, grads, scale, sums_keys=True)


def _walk(
    part: Part, heads: Heads, spans: Spans, dv_sum: Tensor, grads: Grads, scale: float, *, sums_keys: bool = False
) -> None:
    length, num_heads, width = heads.q_THD.shape
    strides = [stride for x in (*heads, dv_sum, grads.dv) for stride in x.stride()[: x.dim() - 1]]
    num_sums = grads.dv.shape[1]
    launch(
        _attention_keys_kernel,
        (part.num_programs(num_sums, of_queries=False), 1, 1),
        (part.ds, *heads, spans.reach_T, dv_sum, grads.dv, grads.dk),
        part.sizes(num_heads, length),
        (*strides, scale),
        {
            "D": width,
            "BD": padded_width(width),
            "V": grads.dv.shape[2],
            "BV": padded_width(grads.dv.shape[2]),
            "GROUP": num_heads // heads.k_TJD.shape[1],
            "HEADS": num_heads // num_sums,
            "IS_BAND": part.is_band,
            "SUMS_KEYS": sums_keys,
            "KEYS": part.keys,
            "QUERIES": part.keys // 2,
        },
        num_warps=4,
    )
