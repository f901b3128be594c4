"""The second round of attention's backward: products of the gradient of scores with queries, and with keys.

In plain Triton: any target, and the tested twin of the one in Gluon (`attention_products_hopper.py`). Shape letters as
in `attention.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.attention import Part, first_key, last_query, load_rows, padded_width, place, write
from expertune.kernels.attention_spans import Spans
from expertune.kernels.launch import launch


@triton.jit(
    do_not_specialize=["first_block", "end", "key_blocks", "num_heads", "T", "pitch_blocks", "rows_blocks", "adds"]
)
def _attention_products_kernel(
    ds_ptr, x_ptr, row_ptr, sum_ptr, out_ptr,
    first_block, end, key_blocks, num_heads, T, pitch_blocks, rows_blocks, adds,
    x_row, x_head, sum_row, sum_head, out_row, out_head, scale,
    D: tl.constexpr, BD: tl.constexpr, OF_QUERIES: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    IS_BAND: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program a block of rows of a sum; those of whole samples with most to sum first."""
    num_blocks = tl.cdiv(end, KEYS)
    num_sums = num_heads // HEADS
    block, own = tl.program_id(0) // num_sums, tl.program_id(0) % num_sums
    if OF_QUERIES:
        block = num_blocks - 1 - block
        first, last = first_key(row_ptr, block, KEYS, KEYS), tl.minimum(block + 1, key_blocks) * KEYS
        has_before = key_blocks <= block
    else:
        first, last = tl.maximum(block, first_block) * KEYS, last_query(row_ptr, block, end, T, KEYS)
        has_before = (block < first_block) | (adds > 0)
    row = block * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((KEYS, BD), dtype=tl.float32)
    for of_sum in range(HEADS):
        head = own * HEADS + of_sum
        for start in range(first, last, DEPTH):
            at = start + tl.arange(0, DEPTH)
            if OF_QUERIES:
                key, query, key_block = at, row, start // KEYS
            else:
                key, query, key_block = row, at, block
            ds_row, ds_shift = place(key_block, first_block, num_blocks - first_block, IS_BAND, KEYS)
            ds_row = head.to(tl.int64) * rows_blocks * KEYS + ds_row + key - key_block * KEYS
            places = ds_row * (pitch_blocks * KEYS)
            if OF_QUERIES:
                mask = (query < end)[:, None]
                ds = tl.load(ds_ptr + places[None, :] + (query + ds_shift)[:, None], mask=mask, other=0.0)
            else:
                ds = tl.load(ds_ptr + places[:, None] + (query + ds_shift)[None, :])
            x = load_rows(x_ptr, at, head // GROUP, T, x_row, x_head, D, BD)
            total = tl.dot(ds, x, total, input_precision="ieee")
    write(sum_ptr, out_ptr, total * scale, row, own, T, has_before, sum_row, sum_head, out_row, out_head, D, BD)


def products(
    part: Part, x_TXD: Tensor, spans: Spans, sum_TSD: Tensor | None, out_TSD: Tensor, scale: float, *, of_queries: bool
) -> None:
    """Write `scale · dS x`, for queries, or of heads of queries `scale · dSᵀ x`, for keys.

    Args:
        part: with the gradient of the scores written.
        x_TXD: keys for queries and queries for keys, in any strides but the last.
        spans: as in the round before.
        sum_TSD: what has been summed before, in float32; None if nothing has. `out` may lie there.
        out_TSD: of queries of the part, or of keys before its end; other rows stay.
        scale: of scores.
        of_queries: whether `out` is of queries.
    """
    length, num_sums, width = out_TSD.shape
    num_heads = (out_TSD if of_queries else x_TXD).shape[1]
    total = out_TSD if sum_TSD is None else sum_TSD
    row_T = spans.first_T if of_queries else spans.reach_T
    strides = [stride for x in (x_TXD, total, out_TSD) for stride in x.stride()[:2]]
    launch(
        _attention_products_kernel,
        (part.num_programs(num_sums, of_queries=of_queries), 1, 1),
        (part.ds, x_TXD, row_T, total, out_TSD),
        part.sizes(num_heads, length),
        (*strides, scale),
        {
            "D": width,
            "BD": padded_width(width),
            "OF_QUERIES": of_queries,
            "GROUP": num_heads // x_TXD.shape[1],
            "HEADS": num_heads // num_sums,
            "IS_BAND": part.is_band,
            "KEYS": part.keys,
            "DEPTH": part.keys // 2,
        },
        num_warps=4,
    )
