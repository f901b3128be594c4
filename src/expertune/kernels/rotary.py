"""Rotary position embeddings of queries and keys: one read, one write, in float32, rounded once.

Written with torch's operations, a rotation of both is 12 kernels forward and 14 backward, each over all heads. The
angles of a token are read once for all of its heads. Any Triton target.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import launch, next_power_of_2

_ELEMENTS = 2048  # pairs of a token that are held at a time


@triton.jit
def turn(x1, x2, c1, s1, c2, s2, BACKWARD: tl.constexpr):
    """Both of each pair, turned, or turned back."""
    if BACKWARD:
        return x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@triton.jit
def angles(cos_ptr, sin_ptr, PAIRS: tl.constexpr, COS_GAP: tl.constexpr, BP: tl.constexpr):
    """Of a token, `(1, BP)`: cosines and sines of the first of each pair, then of the second."""
    pair = tl.arange(0, BP)[None, :]
    mask = pair < PAIRS
    c1 = tl.load(cos_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + pair + COS_GAP, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + pair + COS_GAP, mask=mask, other=0.0).to(tl.float32)
    return c1, s1, c2, s2


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, c1, s1, c2, s2, H, x_head, y_head,
    PAIRS: tl.constexpr, REST: tl.constexpr, X_STEP: tl.constexpr, X_GAP: tl.constexpr, Y_STEP: tl.constexpr,
    Y_GAP: tl.constexpr, BACKWARD: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    pair = tl.arange(0, BP)[None, :]
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)[:, None].to(tl.int64)  # heads of all tokens may lie 2³¹ elements apart
        mask = (head < H) & (pair < PAIRS)
        x = x_ptr + head * x_head + pair * X_STEP
        y = y_ptr + head * y_head + pair * Y_STEP
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + X_GAP, mask=mask, other=0.0).to(tl.float32)
        y1, y2 = turn(x1, x2, c1, s1, c2, s2, BACKWARD)
        tl.store(y, y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + Y_GAP, y2.to(y_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            beside = tl.arange(0, BR)[None, :]
            kept = (head < H) & (beside < REST)
            rest = tl.load(x_ptr + head * x_head + 2 * PAIRS + beside, mask=kept, other=0.0)
            tl.store(y_ptr + head * y_head + 2 * PAIRS + beside, rest, mask=kept)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_batch, k_batch, q_out_batch, k_out_batch, cos_batch,
    HQ, HK, q_head, k_head, q_out_head, k_out_head, q_token, k_token, q_out_token, k_out_token, cos_token,
    PAIRS: tl.constexpr, REST: tl.constexpr, X_STEP: tl.constexpr, X_GAP: tl.constexpr, Y_STEP: tl.constexpr,
    Y_GAP: tl.constexpr, COS_GAP: tl.constexpr, BACKWARD: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_angle = batch * cos_batch + token * cos_token
    c1, s1, c2, s2 = angles(cos_ptr + at_angle, sin_ptr + at_angle, PAIRS, COS_GAP, BP)
    _rotate_heads(
        q_ptr + batch * q_batch + token * q_token, q_out_ptr + batch * q_out_batch + token * q_out_token,
        c1, s1, c2, s2, HQ, q_head, q_out_head, PAIRS, REST, X_STEP, X_GAP, Y_STEP, Y_GAP, BACKWARD, BH, BP, BR,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + batch * k_batch + token * k_token, k_out_ptr + batch * k_out_batch + token * k_out_token,
        c1, s1, c2, s2, HK, k_head, k_out_head, PAIRS, REST, X_STEP, X_GAP, Y_STEP, Y_GAP, BACKWARD, BH, BP, BR,
    )  # fmt: skip


def pairs(num_rotated: int, *, is_interleaved: bool, is_shared: bool) -> dict[str, int]:
    """How pairs lie in a head that is read, and their angles: constants of kernels that rotate, in this order."""
    half = num_rotated // 2
    return {
        "PAIRS": half,
        "STEP": 2 if is_interleaved else 1,
        "GAP": 1 if is_interleaved else half,
        "COS_GAP": 0 if is_shared else half,
    }


def batch_stride(x: Tensor) -> int:
    """From one sample to the next; 0 where there is one for all."""
    return x.stride(0) if x.shape[0] > 1 else 0


def rotate(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    num_rotated: int,
    *,
    is_interleaved: bool = False,
    is_shared: bool = False,
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their tokens; what is wider than is rotated passes as it is.

    Args:
        q_BHTD: any strides but in the last dimension.
        k_BHTD: the same, with as many heads as it likes.
        cos_BTR: of the angles, contiguous; `B` may be 1, and `R` half of what is rotated if angles are shared.
        sin_BTR: the same.
        num_rotated: elements of a head, from its first.
        is_interleaved: the input's pairs are neighbours; otherwise its halves. The output's are halves.
        is_shared: both of a pair take the angle of the first; otherwise each its own.
        backward: the transposed map instead, from gradients of the outputs to those of the inputs.
    """
    batch, _, num_tokens, width = q_BHTD.shape
    outs = [torch.empty_like(x) for x in (q_BHTD, k_BHTD)]
    if 0 in q_BHTD.shape or 0 in k_BHTD.shape:
        return outs[0], outs[1]
    half, rest = num_rotated // 2, width - num_rotated
    inputs = (2, 1) if is_interleaved else (1, half)
    (x_step, x_gap), (y_step, y_gap) = ((1, half), inputs) if backward else (inputs, (1, half))
    block = next_power_of_2(half)
    tensors = (q_BHTD, k_BHTD, *outs)
    most_heads = max(q_BHTD.shape[1], k_BHTD.shape[1])
    launch(
        _rotary_kernel,
        (num_tokens, batch, 1),
        (q_BHTD, k_BHTD, cos_BTR, sin_BTR, *outs),
        (),
        # strides are specialised on, because a load that is known to be aligned is a wide one
        (*map(batch_stride, tensors), batch_stride(cos_BTR))
        + (q_BHTD.shape[1], k_BHTD.shape[1], *[x.stride(i) for i in (1, 2) for x in tensors], cos_BTR.stride(1)),
        {
            "PAIRS": half,
            "REST": rest,
            "X_STEP": x_step,
            "X_GAP": x_gap,
            "Y_STEP": y_step,
            "Y_GAP": y_gap,
            "COS_GAP": 0 if is_shared else half,
            "BACKWARD": backward,
            "BH": max(1, min(next_power_of_2(most_heads), _ELEMENTS // block)),
            "BP": block,
            "BR": next_power_of_2(max(rest, 1)),
        },
        num_warps=4,
    )
    return outs[0], outs[1]
