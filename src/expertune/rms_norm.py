"""Root-mean-square norms of hidden states, queries and keys: one fused operation, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.kernels import has_triton

_WIDEST = 16384  # of a row that one program holds


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + offset)` over the last dimension, in float32, rounded once.

    By our kernel where the weight is frozen and there is Triton, else by torch's fused operation.

    Args:
        x: `(…, D)`.
        weight_D: in the dtype of `x` or another.
        eps: is added to the mean square.
        offset: is added to the weight.

    Returns:
        in the dtype of `x`.
    """
    if _is_ours(x, weight_D):
        return _FrozenNorm.apply(x, weight_D, eps, offset)  # type: ignore[no-untyped-call,no-any-return]
    if offset:
        weight_D = weight_D.float() + offset
    if weight_D.dtype != x.dtype:
        return rms_norm(x.float(), weight_D.float(), eps).to(x.dtype)
    # not `F.rms_norm`: under autocast that one computes in float32 and returns it
    out: Tensor = torch._fused_rms_norm(x, weight_D.shape, weight_D, eps)[0]
    return out


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float) -> Tensor:
        from expertune.kernels.rms_norm import norm  # imports Triton, which is optional

        x_ND, weight_D = x.reshape(-1, x.shape[-1]).contiguous(), weight_D.contiguous()
        y_ND, scale_N = norm(x_ND, weight_D, eps, offset)
        ctx.save_for_backward(x_ND, weight_D, scale_N)
        ctx.offset = offset
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from expertune.kernels.rms_norm import norm_backward

        x_ND, weight_D, scale_N = ctx.saved_tensors
        dx_ND = norm_backward(dy.reshape(x_ND.shape).contiguous(), x_ND, weight_D, scale_N, ctx.offset)
        return dx_ND.view(dy.shape), None, None, None


def _is_ours(x: Tensor, weight_D: Tensor) -> bool:
    is_trained = torch.is_grad_enabled() and weight_D.requires_grad
    is_known = x.is_cuda and weight_D.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _WIDEST
    return is_known and not is_trained and has_triton()
