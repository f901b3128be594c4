"""Combine: each token's rows summed in a fixed order, in float32, with the router's weights or without.

With weights it is the end of the forward; without, the backward of copying tokens to rows. One read of the rows, one
write of the tokens, no atomics. Any Triton target.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch, next_power_of_2


@triton.jit
def _combine_kernel(
    y_ptr, weight_ptr, slot_row_ptr, out_ptr, D, K: tl.constexpr, IS_WEIGHTED: tl.constexpr, BD: tl.constexpr
):
    """One program per token and block of the width."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_width = d < D
    acc = tl.zeros((BD,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + k).to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=in_width, other=0.0).to(tl.float32)
        if IS_WEIGHTED:
            y *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        acc += y
    tl.store(out_ptr + token * D + d, acc.to(out_ptr.dtype.element_ty), mask=in_width)


def combine(y_ND: Tensor, token_row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """`out_TD`, in the dtype of `y_ND`.

    Args:
        y_ND: contiguous.
        token_row_TK: the row of each slot, int32, contiguous.
        weight_TK: contiguous, any floating dtype.
    """
    num_tokens, top_k = token_row_TK.shape
    width = y_ND.shape[1]
    out_TD = y_ND.new_empty((num_tokens, width))
    if num_tokens == 0:
        return out_TD
    block = min(1024, max(16, next_power_of_2(width)))
    launch(
        _combine_kernel,
        (num_tokens, ceil_div(width, block), 1),
        (y_ND, weight_TK if weight_TK is not None else y_ND, token_row_TK, out_TD),
        (),
        (width,),
        {"K": top_k, "IS_WEIGHTED": weight_TK is not None, "BD": block},
        num_warps=4,
    )
    return out_TD
