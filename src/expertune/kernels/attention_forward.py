"""Attention's forward over spans of keys: an online softmax, one pass over the keys that a block of queries attends to.

A head may have a sink: one more score of each of its queries, whose value is zero.

In plain Triton: any target, and the tested twin of the one in Gluon (`attention_forward_hopper.py`). Source of the
equations: FlashAttention-2 (arXiv 2307.08691), section 3.1.1. Shape letters as in `attention.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.attention import first_key, load_rows, padded_width, write
from expertune.kernels.attention_order import in_order, own_block
from expertune.kernels.attention_spans import Spans
from expertune.kernels.launch import launch

_QUERIES = 32  # of a block
_KEYS = 16  # of a tile
LOWEST = tl.constexpr(-1e30)  # of a score before the first, so that no difference is of two infinities


@triton.jit(do_not_specialize=["num_heads", "T", "together"])
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, out_ptr, lse_ptr, sinks_ptr,
    num_heads, T, together,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head, scale,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr, HAS_SINKS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a block of queries of a head."""
    block, head = own_block(tl.cdiv(T, QUERIES), num_heads, together)
    query = block * QUERIES + tl.arange(0, QUERIES)
    first = tl.load(first_ptr + query, mask=query < T, other=0)
    q = load_rows(q_ptr, query, head, T, q_row, q_head, D, BD)
    highest = tl.full((QUERIES,), LOWEST, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BV), tl.float32)
    for start in range(first_key(first_ptr, block, QUERIES, KEYS), (block + 1) * QUERIES, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, head // GROUP, T, k_row, k_head, D, BD)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        is_seen = (key[None, :] <= query[:, None]) & (key[None, :] >= first[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp(scores - highest[:, None])
        fading = tl.exp(before - highest)
        total = total * fading + tl.sum(p, 1)
        v = load_rows(v_ptr, key, head // GROUP, T, v_row, v_head, V, BV)
        out = tl.dot(p.to(v.dtype), v, out * fading[:, None], input_precision="ieee")
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        before = highest
        highest = tl.maximum(highest, sink)
        fading = tl.exp(before - highest)
        total = total * fading + tl.exp(sink - highest)
        out *= fading[:, None]
    tl.store(lse_ptr + head.to(tl.int64) * lse_head + query, highest + tl.log(total), mask=query < T)
    out /= total[:, None]
    write(out_ptr, out_ptr, out, query, head, T, False, out_row, out_head, out_row, out_head, V, BV)


def forward(
    q_THD: Tensor,
    k_TJD: Tensor,
    v_TJV: Tensor,
    spans: Spans,
    out_THV: Tensor,
    lse_HT: Tensor,
    scale: float,
    sinks_H: Tensor | None = None,
) -> None:
    """Write what attention gives, and the logarithm of the sum of each query's exponentials.

    Args:
        q_THD, k_TJD, v_TJV: what attends. In any strides but the last.
        spans: of their rows.
        out_THV: in the dtype of the queries.
        lse_HT: natural, float32.
        scale: of scores.
        sinks_H: contiguous, in any floating dtype.
    """
    (_, num_heads, width), num_shared = q_THD.shape, k_TJD.shape[1]
    grid, sizes = in_order(q_THD, num_shared, _QUERIES)
    launch(
        _attention_forward_kernel,
        grid,
        (q_THD, k_TJD, v_TJV, spans.first_T, out_THV, lse_HT, lse_HT if sinks_H is None else sinks_H),
        sizes,
        (*[stride for x in (q_THD, k_TJD, v_TJV, out_THV) for stride in x.stride()[:2]], lse_HT.stride(0), scale),
        {
            "D": width,
            "BD": padded_width(width),
            "V": v_TJV.shape[2],
            "BV": padded_width(v_TJV.shape[2]),
            "GROUP": num_heads // num_shared,
            "HAS_SINKS": sinks_H is not None,
            "QUERIES": _QUERIES,
            "KEYS": _KEYS,
        },
        num_warps=4,
    )
