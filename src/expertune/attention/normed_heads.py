"""Norms of queries or keys that are rotated as they are computed: one node of autograd, one read of them each way.

Who norms them does not know that they will be rotated, and who rotates them that they have been normed. So this gives
both, the norms and what they become, and takes the gradient of either.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.attention.rotary import Rotation, why_no_kernel


def why_not(x_BTHD: Tensor, weight_D: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation) -> str | None:
    """Why `norm_and_rotate` does not take these, in words; None if it does."""
    if (reason := why_no_kernel((x_BTHD,), (cos_BTR, sin_BTR))) is not None:
        return reason
    if weight_D.requires_grad and torch.is_grad_enabled():
        return "the weight is trained"
    if x_BTHD.dim() != 4 or cos_BTR.dim() != 3 or cos_BTR.shape[0] not in (1, x_BTHD.shape[0]):
        return "shapes are of another kind"
    num_rotated, width = rotation.num_rotated(cos_BTR), x_BTHD.shape[-1]
    if num_rotated % 2 or not (num_rotated == width or (rotation.passes and num_rotated < width)):
        return "heads are of another width than angles"
    return None if cos_BTR.shape[1] == x_BTHD.shape[1] else "there are angles of other tokens"


def norm_and_rotate(
    x_BTHD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    rotation: Rotation,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x, weight, eps, offset)`, and these heads turned by the angles of their tokens; see both.

    Computed in float32, and each rounded once. Only for what `why_not` has nothing against.
    """
    return _NormAndRotate.apply(  # type: ignore[no-untyped-call,no-any-return]
        x_BTHD, weight_D, eps, offset, cos_BTR, sin_BTR, rotation
    )


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTHD: Tensor,
        weight_D: Tensor,
        eps: float,
        offset: float,
        cos_BTR: Tensor,
        sin_BTR: Tensor,
        rotation: Rotation,
    ) -> tuple[Tensor, Tensor]:
        from expertune.kernels.normed_heads import norm_and_turn  # imports Triton, which is optional

        x_BTHD, weight_D, cos_BTR, sin_BTR = (x.contiguous() for x in (x_BTHD, weight_D, cos_BTR, sin_BTR))
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.rotation = offset, rotation
        y_BTHD, turned_BTHD, scale_BTH = norm_and_turn(
            x_BTHD,
            weight_D,
            cos_BTR,
            sin_BTR,
            rotation.num_rotated(cos_BTR),
            eps=eps,
            offset=offset,
            is_interleaved=rotation.interleaved,
            is_shared=rotation.shares_angles,
        )
        ctx.save_for_backward(x_BTHD, weight_D, cos_BTR, sin_BTR, scale_BTH)
        return y_BTHD, turned_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHD: Tensor | None, dturned_BTHD: Tensor | None) -> tuple[Tensor | None, ...]:
        from expertune.kernels import normed_heads, rms_norm

        x_BTHD, weight_D, cos_BTR, sin_BTR, scale_BTH = ctx.saved_tensors
        dx = None
        if dturned_BTHD is not None:
            dx = normed_heads.backward(
                dturned_BTHD if dturned_BTHD.stride(-1) == 1 else dturned_BTHD.contiguous(),
                x_BTHD,
                weight_D,
                cos_BTR,
                sin_BTR,
                scale_BTH,
                ctx.rotation.num_rotated(cos_BTR),
                offset=ctx.offset,
                is_interleaved=ctx.rotation.interleaved,
                is_shared=ctx.rotation.shares_angles,
            )
        if dy_BTHD is not None:
            width = x_BTHD.shape[-1]
            rows = dy_BTHD.reshape(-1, width).contiguous(), x_BTHD.view(-1, width), weight_D, scale_BTH.view(-1)
            of_norms = rms_norm.norm_backward(*rows, ctx.offset).view(x_BTHD.shape)
            dx = of_norms if dx is None else dx + of_norms
        return dx, None, None, None, None, None, None
