"""Heads of queries or keys: their norm and, of that, their rotation, in one pass; and both of them back.

By themselves a norm and a rotation read and write all heads each, in forward and again in backward, and memory bounds
both. Here a head is normed and turned while it is at hand. Any Triton target.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import launch, next_power_of_2
from expertune.kernels.rms_norm import scale_of
from expertune.kernels.rotary import angles, batch_stride, pairs, turn

_ELEMENTS = 2048  # of a token's heads that are held at a time


@triton.jit
def _weights(weight_ptr, offset, PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, BP: tl.constexpr):
    """Of the first and of the second of each pair, `(1, BP)`."""
    pair = tl.arange(0, BP)[None, :]
    w1 = tl.load(weight_ptr + pair * STEP, mask=pair < PAIRS, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + pair * STEP + GAP, mask=pair < PAIRS, other=0.0).to(tl.float32)
    return w1 + offset, w2 + offset


@triton.jit(do_not_specialize=["T"])
def _norm_and_turn_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, turned_ptr, scale_ptr,
    T, H, cos_batch, cos_token, eps, offset,
    PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, COS_GAP: tl.constexpr, REST: tl.constexpr,
    BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program a token: `y = x · scale · (weight + offset)` of each head, and `y` turned by the token's angles."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_angle = batch * cos_batch + token * cos_token
    c1, s1, c2, s2 = angles(cos_ptr + at_angle, sin_ptr + at_angle, PAIRS, COS_GAP, BP)
    D: tl.constexpr = 2 * PAIRS + REST
    pair, beside = tl.arange(0, BP)[None, :], 2 * PAIRS + tl.arange(0, BR)[None, :]
    w1, w2 = _weights(weight_ptr, offset, PAIRS, STEP, GAP, BP)
    if REST > 0:
        w_rest = tl.load(weight_ptr + beside, mask=beside < D, other=0.0).to(tl.float32) + offset
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)
        row = (batch * T + token) * H + head
        mask = (head[:, None] < H) & (pair < PAIRS)
        places, turned = row[:, None] * D + pair * STEP, turned_ptr + row[:, None] * D
        x1 = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + places + GAP, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(x1 * x1 + x2 * x2, axis=1)
        kept = (head[:, None] < H) & (beside < D)
        if REST > 0:
            rest = tl.load(x_ptr + row[:, None] * D + beside, mask=kept, other=0.0).to(tl.float32)
            total += tl.sum(rest * rest, axis=1)
        scale = scale_of(total, D, eps)
        y1, y2 = x1 * scale[:, None] * w1, x2 * scale[:, None] * w2
        tl.store(y_ptr + places, y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + places + GAP, y2.to(y_ptr.dtype.element_ty), mask=mask)
        t1, t2 = turn(y1, y2, c1, s1, c2, s2, False)
        tl.store(turned + pair, t1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(turned + pair + PAIRS, t2.to(y_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            y_rest = (rest * scale[:, None] * w_rest).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + row[:, None] * D + beside, y_rest, mask=kept)
            tl.store(turned + beside, y_rest, mask=kept)
        tl.store(scale_ptr + row, scale, mask=head < H)


@triton.jit(do_not_specialize=["T"])
def _turn_and_norm_backward_kernel(
    dturned_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, dx_ptr,
    T, H, cos_batch, cos_token, d_batch, d_token, d_head, offset,
    PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, COS_GAP: tl.constexpr, REST: tl.constexpr,
    BH: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`dx = scale · (g − x̂ · mean(g · x̂))`, where `g = dy · (weight + offset)`, `x̂ = x · scale`, and `dy` is turned
    back. One program a token."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_angle = batch * cos_batch + token * cos_token
    c1, s1, c2, s2 = angles(cos_ptr + at_angle, sin_ptr + at_angle, PAIRS, COS_GAP, BP)
    D: tl.constexpr = 2 * PAIRS + REST
    pair, beside = tl.arange(0, BP)[None, :], 2 * PAIRS + tl.arange(0, BR)[None, :]
    w1, w2 = _weights(weight_ptr, offset, PAIRS, STEP, GAP, BP)
    if REST > 0:
        w_rest = tl.load(weight_ptr + beside, mask=beside < D, other=0.0).to(tl.float32) + offset
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)
        row = (batch * T + token) * H + head
        mask = (head[:, None] < H) & (pair < PAIRS)
        places = row[:, None] * D + pair * STEP
        # heads of all tokens may lie 2³¹ elements apart
        d = dturned_ptr + batch * d_batch + token * d_token + head[:, None].to(tl.int64) * d_head
        scale = tl.load(scale_ptr + row, mask=head < H, other=0.0)[:, None]
        x1 = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32) * scale
        x2 = tl.load(x_ptr + places + GAP, mask=mask, other=0.0).to(tl.float32) * scale
        d1 = tl.load(d + pair, mask=mask, other=0.0).to(tl.float32)
        d2 = tl.load(d + pair + PAIRS, mask=mask, other=0.0).to(tl.float32)
        g1, g2 = turn(d1, d2, c1, s1, c2, s2, True)
        g1, g2 = g1 * w1, g2 * w2
        total = tl.sum(g1 * x1 + g2 * x2, axis=1)
        kept = (head[:, None] < H) & (beside < D)
        if REST > 0:
            x_rest = tl.load(x_ptr + row[:, None] * D + beside, mask=kept, other=0.0).to(tl.float32) * scale
            g_rest = tl.load(d + beside, mask=kept, other=0.0).to(tl.float32) * w_rest
            total += tl.sum(g_rest * x_rest, axis=1)
        mean = tl.div_rn(total, tl.cast(D, tl.float32))[:, None]
        tl.store(dx_ptr + places, (scale * (g1 - x1 * mean)).to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + places + GAP, (scale * (g2 - x2 * mean)).to(dx_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            dx_rest = (scale * (g_rest - x_rest * mean)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row[:, None] * D + beside, dx_rest, mask=kept)


def norm_and_turn(
    x_BTHD: Tensor,
    weight_D: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    num_rotated: int,
    *,
    eps: float,
    offset: float,
    is_interleaved: bool,
    is_shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norms of heads, these turned, and what backward needs of each head, `(B, T, H)` in float32.

    Args:
        x_BTHD: contiguous.
        weight_D: of the norm, in any floating dtype.
        cos_BTR: of the angles of tokens, contiguous; `B` may be 1, and `R` half of what is rotated if they are shared.
        sin_BTR: the same.
        num_rotated: elements of a head, from its first; the others pass.
        eps: is added to the mean square.
        offset: is added to the weight.
        is_interleaved: pairs are neighbours; otherwise halves. In what is turned they are halves.
        is_shared: both of a pair take the angle of the first; otherwise each its own.
    """
    y_BTHD, turned_BTHD = torch.empty_like(x_BTHD), torch.empty_like(x_BTHD)
    scale_BTH = x_BTHD.new_empty(x_BTHD.shape[:-1], dtype=torch.float32)
    if x_BTHD.numel():
        batch, num_tokens, num_heads, _ = x_BTHD.shape
        launch(
            _norm_and_turn_kernel,
            (num_tokens, batch, 1),
            (x_BTHD, weight_D, cos_BTR, sin_BTR, y_BTHD, turned_BTHD, scale_BTH),
            (num_tokens,),
            (num_heads, batch_stride(cos_BTR), cos_BTR.stride(1), eps, offset),
            _constants(x_BTHD, num_rotated, is_interleaved=is_interleaved, is_shared=is_shared),
            num_warps=2,
        )
    return y_BTHD, turned_BTHD, scale_BTH


def backward(
    dturned_BTHD: Tensor,
    x_BTHD: Tensor,
    weight_D: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    scale_BTH: Tensor,
    num_rotated: int,
    *,
    offset: float,
    is_interleaved: bool,
    is_shared: bool,
) -> Tensor:
    """`dx_BTHD`, from the gradient of what was turned.

    Args:
        dturned_BTHD: any strides but in the last dimension.
        x_BTHD, weight_D, cos_BTR, sin_BTR, num_rotated, offset, is_interleaved, is_shared: as in forward.
        scale_BTH: from there.
    """
    dx_BTHD = torch.empty_like(x_BTHD)
    if x_BTHD.numel():
        batch, num_tokens, num_heads, _ = x_BTHD.shape
        launch(
            _turn_and_norm_backward_kernel,
            (num_tokens, batch, 1),
            (dturned_BTHD, x_BTHD, weight_D, cos_BTR, sin_BTR, scale_BTH, dx_BTHD),
            (num_tokens,),
            # strides are specialised on, because a load that is known to be aligned is a wide one
            (num_heads, batch_stride(cos_BTR), cos_BTR.stride(1))
            + (batch_stride(dturned_BTHD), *dturned_BTHD.stride()[1:3], offset),
            _constants(x_BTHD, num_rotated, is_interleaved=is_interleaved, is_shared=is_shared),
            num_warps=2,
        )
    return dx_BTHD


def _constants(x_BTHD: Tensor, num_rotated: int, *, is_interleaved: bool, is_shared: bool) -> dict[str, int]:
    num_heads, width = x_BTHD.shape[2:]
    rest = width - num_rotated
    block, beside = next_power_of_2(num_rotated // 2), next_power_of_2(max(rest, 1))
    most_heads = max(1, _ELEMENTS // (2 * block + (beside if rest else 0)))
    return {
        **pairs(num_rotated, is_interleaved=is_interleaved, is_shared=is_shared),
        "REST": rest,
        "BH": min(next_power_of_2(num_heads), 1 << (most_heads.bit_length() - 1)),
        "BP": block,
        "BR": beside,
    }
