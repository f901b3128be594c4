"""What multi-head latent attention reads of its projections: queries, keys and their gradients, each in one pass.

The last elements of a query's head are rotated; a key's head is its own part and one rotated part that all heads share.
Written with torch's operations, both are split, rotated and joined anew, at two to three reads and writes of all heads
each way, and gradients are copied back into the projections' layout. Here heads lie as the projections have them, `(B,
T, H, …)`, and each element is read and written once. Computed in float32, rounded once. Any Triton target.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import launch, next_power_of_2
from expertune.kernels.rotary import angles, batch_stride, pairs, turn

_ELEMENTS = 2048  # of a token that are held at a time


@triton.jit
def _copy(x_ptr, y_ptr, head, x_head, y_head, H, WIDTH: tl.constexpr, BW: tl.constexpr):
    """The first elements of some heads."""
    element = tl.arange(0, BW)[None, :]
    mask = (head < H) & (element < WIDTH)
    x = tl.load(x_ptr + head * x_head + element, mask=mask, other=0.0)
    tl.store(y_ptr + head * y_head + element, x, mask=mask)


@triton.jit
def _assemble_kernel(
    q_ptr, kv_ptr, rot_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_batch, kv_batch, rot_batch, cos_batch, out_batch, v_batch,
    q_token, kv_token, rot_token, cos_token, out_token, v_token, q_head, kv_head, out_head, v_head, H,
    PASS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, COS_GAP: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr, VALUE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_angle = batch * cos_batch + token * cos_token
    c1, s1, c2, s2 = angles(cos_ptr + at_angle, sin_ptr + at_angle, PAIRS, COS_GAP, BP)
    q_ptr += batch * q_batch + token * q_token
    kv_ptr += batch * kv_batch + token * kv_token
    q_out_ptr += batch * out_batch + token * out_token
    k_out_ptr += batch * out_batch + token * out_token
    v_out_ptr += batch * v_batch + token * v_token
    pair = tl.arange(0, BP)[None, :]
    rot = rot_ptr + batch * rot_batch + token * rot_token + pair * STEP
    x1 = tl.load(rot, mask=pair < PAIRS, other=0.0).to(tl.float32)
    x2 = tl.load(rot + GAP, mask=pair < PAIRS, other=0.0).to(tl.float32)
    k1, k2 = turn(x1, x2, c1, s1, c2, s2, False)
    dtype = q_out_ptr.dtype.element_ty
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)[:, None].to(tl.int64)  # heads of all tokens may lie 2³¹ elements apart
        _copy(q_ptr, q_out_ptr, head, q_head, out_head, H, PASS, BW)
        _copy(kv_ptr, k_out_ptr, head, kv_head, out_head, H, PASS, BW)
        _copy(kv_ptr + PASS, v_out_ptr, head, kv_head, v_head, H, VALUE, BV)
        mask = (head < H) & (pair < PAIRS)
        q = q_ptr + head * q_head + PASS + pair * STEP
        q1 = tl.load(q, mask=mask, other=0.0).to(tl.float32)
        q2 = tl.load(q + GAP, mask=mask, other=0.0).to(tl.float32)
        q1, q2 = turn(q1, q2, c1, s1, c2, s2, False)
        at = head * out_head + PASS + pair
        tl.store(q_out_ptr + at, q1.to(dtype), mask=mask)
        tl.store(q_out_ptr + at + PAIRS, q2.to(dtype), mask=mask)
        tl.store(k_out_ptr + at, tl.broadcast_to(k1, (BH, BP)).to(dtype), mask=mask)
        tl.store(k_out_ptr + at + PAIRS, tl.broadcast_to(k2, (BH, BP)).to(dtype), mask=mask)


@triton.jit
def _take_apart_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, q_grad_ptr, kv_grad_ptr, rot_grad_ptr,
    dq_batch, dk_batch, dv_batch, cos_batch, q_batch, kv_batch, rot_batch,
    dq_token, dk_token, dv_token, cos_token, q_token, kv_token, rot_token,
    dq_head, dk_head, dv_head, q_head, kv_head, H,
    PASS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, COS_GAP: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BP: tl.constexpr, VALUE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a token: the gradients of what `_assemble_kernel` read. Those of the shared part add up in order."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at_angle = batch * cos_batch + token * cos_token
    c1, s1, c2, s2 = angles(cos_ptr + at_angle, sin_ptr + at_angle, PAIRS, COS_GAP, BP)
    dq_ptr += batch * dq_batch + token * dq_token
    dk_ptr += batch * dk_batch + token * dk_token
    dv_ptr += batch * dv_batch + token * dv_token
    q_grad_ptr += batch * q_batch + token * q_token
    kv_grad_ptr += batch * kv_batch + token * kv_token
    pair = tl.arange(0, BP)[None, :]
    dtype = q_grad_ptr.dtype.element_ty
    k1 = tl.zeros((BH, BP), dtype=tl.float32)
    k2 = tl.zeros((BH, BP), dtype=tl.float32)
    for first in range(0, H, BH):
        head = first + tl.arange(0, BH)[:, None].to(tl.int64)  # heads of all tokens may lie 2³¹ elements apart
        _copy(dq_ptr, q_grad_ptr, head, dq_head, q_head, H, PASS, BW)
        _copy(dk_ptr, kv_grad_ptr, head, dk_head, kv_head, H, PASS, BW)
        _copy(dv_ptr, kv_grad_ptr + PASS, head, dv_head, kv_head, H, VALUE, BV)
        mask = (head < H) & (pair < PAIRS)
        dq = dq_ptr + head * dq_head + PASS + pair
        q1 = tl.load(dq, mask=mask, other=0.0).to(tl.float32)
        q2 = tl.load(dq + PAIRS, mask=mask, other=0.0).to(tl.float32)
        q1, q2 = turn(q1, q2, c1, s1, c2, s2, True)
        at = q_grad_ptr + head * q_head + PASS + pair * STEP
        tl.store(at, q1.to(dtype), mask=mask)
        tl.store(at + GAP, q2.to(dtype), mask=mask)
        dk = dk_ptr + head * dk_head + PASS + pair
        k1 += tl.load(dk, mask=mask, other=0.0).to(tl.float32)
        k2 += tl.load(dk + PAIRS, mask=mask, other=0.0).to(tl.float32)
    k1, k2 = turn(tl.sum(k1, 0)[None, :], tl.sum(k2, 0)[None, :], c1, s1, c2, s2, True)
    at = rot_grad_ptr + batch * rot_batch + token * rot_token + pair * STEP
    tl.store(at, k1.to(dtype), mask=pair < PAIRS)
    tl.store(at + GAP, k2.to(dtype), mask=pair < PAIRS)


def assemble(
    q_BTHD: Tensor,
    kv_BTHC: Tensor,
    rot_BTR: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    *,
    is_interleaved: bool,
    is_shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, `(B, T, H, D)`, and values, `(B, T, H, V)`, contiguous.

    Args:
        q_BTHD: of which the last `R` elements of a head are rotated; any strides but in the last dimension, as all.
        kv_BTHC: of which the first `D - R` elements of a head are its key's, and the others its value.
        rot_BTR: the part of keys that is rotated.
        cos_BTR: of the angles, contiguous; `B` may be 1, and `R` half as wide if angles are shared.
        sin_BTR: the same.
        is_interleaved: the input's pairs are neighbours; otherwise its halves. The output's are halves.
        is_shared: both of a pair take the angle of the first; otherwise each its own.
    """
    batch, num_tokens, num_heads, width = q_BTHD.shape
    num_passed, num_rotated = width - rot_BTR.shape[-1], rot_BTR.shape[-1]
    num_values = kv_BTHC.shape[-1] - num_passed
    q, k = (torch.empty_like(q_BTHD, memory_format=torch.contiguous_format) for _ in range(2))
    v = kv_BTHC.new_empty(batch, num_tokens, num_heads, num_values)
    if q.numel():
        tensors = (q_BTHD, kv_BTHC, rot_BTR, cos_BTR)
        constants = _constants(num_heads, num_passed, num_rotated, is_interleaved, is_shared)
        launch(
            _assemble_kernel,
            (num_tokens, batch, 1),
            (q_BTHD, kv_BTHC, rot_BTR, cos_BTR, sin_BTR, q, k, v),
            (),
            (*map(batch_stride, tensors), q.stride(0), v.stride(0), *[x.stride(1) for x in (*tensors, q, v)])
            + (*[x.stride(2) for x in (q_BTHD, kv_BTHC, q, v)], num_heads),
            constants | {"VALUE": num_values, "BV": next_power_of_2(num_values)},
            num_warps=4,
        )
    return q, k, v


def take_apart(
    dq_BTHD: Tensor,
    dk_BTHD: Tensor,
    dv_BTHV: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    num_rotated: int,
    *,
    is_interleaved: bool,
    is_shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `assemble`'s `q_BTHD`, `kv_BTHC` and `rot_BTR`, contiguous.

    Args:
        dq_BTHD: of queries; any strides but in the last dimension, as all.
        dk_BTHD: of keys.
        dv_BTHV: of values, which lie behind the keys' part of `kv_BTHC`.
        cos_BTR, sin_BTR, is_interleaved, is_shared: as there.
        num_rotated: `R`.
    """
    batch, num_tokens, num_heads, width = dq_BTHD.shape
    num_passed, num_values = width - num_rotated, dv_BTHV.shape[-1]
    q = torch.empty_like(dq_BTHD, memory_format=torch.contiguous_format)
    kv = dk_BTHD.new_empty(batch, num_tokens, num_heads, num_passed + num_values)
    rot = dk_BTHD.new_empty(batch, num_tokens, num_rotated)
    if q.numel():
        tensors = (dq_BTHD, dk_BTHD, dv_BTHV, cos_BTR, q, kv, rot)
        constants = _constants(num_heads, num_passed, num_rotated, is_interleaved, is_shared)
        launch(
            _take_apart_kernel,
            (num_tokens, batch, 1),
            (dq_BTHD, dk_BTHD, dv_BTHV, cos_BTR, sin_BTR, q, kv, rot),
            (),
            (*map(batch_stride, tensors), *[x.stride(1) for x in tensors])
            + (*[x.stride(2) for x in (dq_BTHD, dk_BTHD, dv_BTHV, q, kv)], num_heads),
            constants | {"VALUE": num_values, "BV": next_power_of_2(num_values)},
            num_warps=4,
        )
    return q, kv, rot


def _constants(
    num_heads: int, num_passed: int, num_rotated: int, is_interleaved: bool, is_shared: bool
) -> dict[str, int]:
    block = next_power_of_2(max(num_passed, 1))
    return {
        "PASS": num_passed,
        **pairs(num_rotated, is_interleaved=is_interleaved, is_shared=is_shared),
        "BH": max(1, min(next_power_of_2(num_heads), _ELEMENTS // block)),
        "BW": block,
        "BP": next_power_of_2(num_rotated // 2),
    }
