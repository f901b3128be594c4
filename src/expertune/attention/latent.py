"""Queries, keys and values of multi-head latent attention, put together from its projections as one node of autograd.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1: of each head a part is rotated, and that part of the keys is one
for all heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.attention.rotary import Rotation, formula, why_no_kernel


def assemble(
    q_BTHD: Tensor, kv_BTHC: Tensor, rot_BTR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `(B, H, T, D)`, and values `(B, H, T, C - D + R)`, as an attention takes them.

    All are new, values too: kept as a part of `kv_BTHC`, they would keep the keys' parts beside the keys. In one kernel
    each way where there is one for these tensors, computed in float32 and rounded once; otherwise by torch's own
    operations.

    Args:
        q_BTHD: a head's own part and, behind it, the one to be rotated.
        kv_BTHC: a head's own part of its key and, behind it, its value.
        rot_BTR: the part of keys to be rotated, of all heads.
        cos_BTR: of the angles, in their dtype or in float32; `B` may be 1, and `R` half of what is rotated.
        sin_BTR: the same.
        rotation: what is rotated with what.
    """
    if why_not(q_BTHD, kv_BTHC, rot_BTR, cos_BTR, sin_BTR, rotation) is None:
        return _Assemble.apply(  # type: ignore[no-untyped-call,no-any-return]
            q_BTHD, kv_BTHC, rot_BTR, cos_BTR, sin_BTR, rotation
        )
    return assemble_in_torch(q_BTHD, kv_BTHC, rot_BTR, cos_BTR, sin_BTR, rotation)


def why_not(
    q_BTHD: Tensor, kv_BTHC: Tensor, rot_BTR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
) -> str | None:
    """Why no kernel takes these, in words; None if one does."""
    tensors = (q_BTHD, kv_BTHC, rot_BTR)
    if (reason := why_no_kernel(tensors, (cos_BTR, sin_BTR), also=torch.float32)) is not None:
        return reason
    if any(x.stride(-1) != 1 for x in tensors):
        return "strides are of another kind"
    if rotation.num_rotated(cos_BTR) != rot_BTR.shape[-1] or rot_BTR.shape[-1] % 2:
        return "rotated parts are of another width than angles"
    return None


def assemble_in_torch(
    q_BTHD: Tensor, kv_BTHC: Tensor, rot_BTR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own operations, on any device."""
    num_passed = q_BTHD.shape[-1] - rot_BTR.shape[-1]
    q_BHTD, kv_BHTC = q_BTHD.transpose(1, 2), kv_BTHC.transpose(1, 2)
    q_rot = formula(q_BHTD[..., num_passed:], cos_BTR, sin_BTR, rotation)
    k_rot = formula(rot_BTR.unsqueeze(1), cos_BTR, sin_BTR, rotation).expand(*kv_BHTC.shape[:-1], -1)
    q = torch.cat((q_BHTD[..., :num_passed], q_rot.to(q_BHTD.dtype)), dim=-1)
    k = torch.cat((kv_BHTC[..., :num_passed], k_rot.to(kv_BHTC.dtype)), dim=-1)
    return q, k, kv_BHTC[..., num_passed:].clone()


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHD: Tensor, kv_BTHC: Tensor, rot_BTR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        from expertune.kernels import latent  # imports Triton, which is optional

        cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.rotation, ctx.num_rotated = rotation, rot_BTR.shape[-1]
        q, k, v = latent.assemble(q_BTHD, kv_BTHC, rot_BTR, cos_BTR, sin_BTR, **_kind(rotation))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from expertune.kernels import latent

        dq, dk, dv = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in grads)
        cos_BTR, sin_BTR = ctx.saved_tensors
        parts = latent.take_apart(dq, dk, dv, cos_BTR, sin_BTR, ctx.num_rotated, **_kind(ctx.rotation))
        return *parts, None, None, None


def _kind(rotation: Rotation) -> dict[str, bool]:
    return {"is_interleaved": rotation.interleaved, "is_shared": rotation.shares_angles}
