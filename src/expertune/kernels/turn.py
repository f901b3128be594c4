"""Turn: a scaled, casting transpose of a matrix.

PEFT keeps `lora_B` as `(O, R·E)`, expert-fastest: a matrix of `O·R` rows and `E` columns. Grouped products read one
matrix an expert, `(E, O·R)`. Any Triton target.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import launch

_P, _Q = 64, 64


@triton.jit
def _turn_kernel(in_ptr, out_ptr, P, Q, scale, BP: tl.constexpr, BQ: tl.constexpr):
    """One program per tile: `out[q, p] = scale · in[p, q]`."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    q = tl.program_id(1) * BQ + tl.arange(0, BQ)
    mask = (p < P)[:, None] & (q < Q)[None, :]
    tile = tl.load(in_ptr + p.to(tl.int64)[:, None] * Q + q[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.trans((tile * scale).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + q.to(tl.int64)[:, None] * P + p[None, :], out, mask=(q < Q)[:, None] & (p < P)[None, :])


def turn(source_PQ: Tensor, out_PQ: Tensor, scale: float) -> None:
    """`out_PQ.copy_(scale · source_PQ)`.

    Args:
        source_PQ: contiguous.
        out_PQ: the transpose of a contiguous tensor, any floating dtype.
        scale: multiplies every element, before it is rounded to the dtype of `out_PQ`.
    """
    num_p, num_q = source_PQ.shape
    assert source_PQ.is_contiguous()
    assert out_PQ.T.is_contiguous()
    grid = (triton.cdiv(num_p, _P), triton.cdiv(num_q, _Q), 1)
    launch(_turn_kernel, grid, (source_PQ, out_PQ), (), (num_p, num_q, scale), {"BP": _P, "BQ": _Q}, num_warps=4)
