"""Rotary position embeddings as one node of autograd, whose backward needs nothing but the angles."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.kernels import has_triton


class Rotation(NamedTuple):
    """Which elements of a head are rotated with each other, and by which angles.

    Args:
        interleaved: the input's pairs are neighbours; otherwise its first and second half. The output's are halves.
        shared: both of a pair take the angle of the first half of `cos`; otherwise the second its own.
        half_width: `cos` is half as wide as what is rotated, so that angles are shared.
        passes: heads may be wider than what is rotated; what lies behind it passes as it is.
    """

    interleaved: bool
    shared: bool
    half_width: bool
    passes: bool

    @property
    def shares_angles(self) -> bool:
        """Whether both of a pair take the same angle, by whichever of the two ways."""
        return self.shared or self.half_width

    def num_rotated(self, cos: Tensor) -> int:
        """Elements of a head."""
        return cos.shape[-1] * (2 if self.half_width else 1)


def why_not(q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation) -> str | None:
    """Why `rotate` does not take these, in words; None if it does."""
    if (reason := why_no_kernel((q_BHTD, k_BHTD), (cos_BTR, sin_BTR))) is not None:
        return reason
    if any(x.dim() != 4 or x.stride(-1) != 1 for x in (q_BHTD, k_BHTD)) or cos_BTR.dim() != 3:
        return "shapes or strides are of another kind"
    num_rotated, widths = rotation.num_rotated(cos_BTR), {q_BHTD.shape[-1], k_BHTD.shape[-1]}
    if len(widths) != 1 or num_rotated % 2 or not (num_rotated in widths or rotation.passes):
        return "heads are of another width than angles"
    return None


def why_no_kernel(
    rotated: tuple[Tensor, ...], angles: tuple[Tensor, Tensor], also: torch.dtype | None = None
) -> str | None:
    """Why no kernel that rotates takes tensors of these dtypes on this device; None if one does.

    Args:
        rotated: what is.
        angles: cosines and sines, in the same dtype.
        also: another dtype that they may have.
    """
    first = rotated[0]
    if not first.is_cuda or not has_triton():
        return "there is no Triton here"
    if any(x.dtype != first.dtype for x in rotated) or any(x.dtype not in (first.dtype, also) for x in angles):
        return "dtypes differ"
    if first.dtype == torch.float64:
        return "dtypes are wider than float32"
    if any(x.requires_grad for x in angles):
        return "angles are trained"
    return None


def rotate(
    q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their tokens, as differentiable as they are.

    Computed in float32 and rounded once. Only for what `why_not` has nothing against.

    Args:
        q_BHTD: any strides but in the last dimension.
        k_BHTD: the same, with as many heads as it likes.
        cos_BTR: of the angles; `B` may be 1.
        sin_BTR: the same.
        rotation: what is rotated with what.
    """
    return _Rotate.apply(q_BHTD, k_BHTD, cos_BTR, sin_BTR, rotation)  # type: ignore[no-untyped-call,no-any-return]


def formula(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation) -> Tensor:
    """The same of queries or keys alone, by torch's own operations on any device."""
    num_rotated = rotation.num_rotated(cos_BTR)
    half = num_rotated // 2
    x, rest = x_BHTD[..., :num_rotated], x_BHTD[..., num_rotated:]
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if rotation.interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1)
    second = slice(0, half) if rotation.shares_angles else slice(half, None)
    y1 = x1 * cos[..., :half] - x2 * sin[..., :half]
    y2 = x2 * cos[..., second] + x1 * sin[..., second]
    return torch.cat((y1, y2, rest), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.rotation = rotation
        return _launch(q_BHTD, k_BHTD, cos_BTR, sin_BTR, rotation, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BHTD: Tensor, dk_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq_BHTD, dk_BHTD))
        cos_BTR, sin_BTR = ctx.saved_tensors
        return *_launch(dq, dk, cos_BTR, sin_BTR, ctx.rotation, backward=True), None, None, None


def _launch(
    q_BHTD: Tensor, k_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, rotation: Rotation, *, backward: bool
) -> tuple[Tensor, Tensor]:
    from expertune.kernels.rotary import rotate  # imports Triton, which is optional

    return rotate(
        q_BHTD,
        k_BHTD,
        cos_BTR,
        sin_BTR,
        rotation.num_rotated(cos_BTR),
        is_interleaved=rotation.interleaved,
        is_shared=rotation.shares_angles,
        backward=backward,
    )
