"""The gradient of queries, in one pass over the keys that a block of queries attends to: scores are formed again.

In plain Triton: any target, and the tested twin of the one in Gluon (`attention_queries_hopper.py`). Source of the
equations: FlashAttention-2 (arXiv 2307.08691), section 3.1.2. Shape letters as in `attention.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.attention import Heads, first_key, load_rows, padded_width, write
from expertune.kernels.attention_order import in_order, own_block
from expertune.kernels.attention_spans import Spans
from expertune.kernels.launch import launch

_QUERIES = 32  # of a block
_KEYS = 16  # of a tile


@triton.jit(do_not_specialize=["num_heads", "T", "together"])
def _attention_queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, first_ptr, dq_ptr,
    num_heads, T, together,
    q_row, q_head, k_row, k_head, v_row, v_head, dout_row, dout_head, lse_head, delta_head, dq_row, dq_head, scale,
    D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a block of queries of a head."""
    block, head = own_block(tl.cdiv(T, QUERIES), num_heads, together)
    query = block * QUERIES + tl.arange(0, QUERIES)
    is_inside = query < T
    first = tl.load(first_ptr + query, mask=is_inside, other=0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * lse_head + query, mask=is_inside, other=0.0)
    delta = tl.load(delta_ptr + head.to(tl.int64) * delta_head + query, mask=is_inside, other=0.0)
    q = load_rows(q_ptr, query, head, T, q_row, q_head, D, BD)
    dout = load_rows(dout_ptr, query, head, T, dout_row, dout_head, D, BD)
    dq = tl.zeros((QUERIES, BD), tl.float32)
    for start in range(first_key(first_ptr, block, QUERIES, KEYS), (block + 1) * QUERIES, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, head // GROUP, T, k_row, k_head, D, BD)
        v = load_rows(v_ptr, key, head // GROUP, T, v_row, v_head, D, BD)
        p = tl.exp(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        p = tl.where((key[None, :] <= query[:, None]) & (key[None, :] >= first[:, None]), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    write(dq_ptr, dq_ptr, dq * scale, query, head, T, False, dq_row, dq_head, dq_row, dq_head, D, BD)


def queries(heads: Heads, spans: Spans, dq_THD: Tensor, scale: float) -> None:
    """Write the gradient of queries.

    Args:
        heads: all rows of theirs.
        spans: of these rows.
        dq_THD: in the dtype of the queries.
        scale: of scores.
    """
    (_, num_heads, width), num_shared = dq_THD.shape, heads.k_TJD.shape[1]
    grid, sizes = in_order(dq_THD, num_shared, _QUERIES)
    strides = [stride for x in (*heads, dq_THD) for stride in x.stride()[: x.dim() - 1]]
    launch(
        _attention_queries_kernel,
        grid,
        (*heads, spans.first_T, dq_THD),
        sizes,
        (*strides, scale),
        {
            "D": width,
            "BD": padded_width(width),
            "GROUP": num_heads // num_shared,
            "QUERIES": _QUERIES,
            "KEYS": _KEYS,
        },
        num_warps=4,
    )
