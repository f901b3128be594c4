"""Split LoRA of one frozen linear, `xW + s(xA)B`, as one node of autograd.

Written with PEFT's own operations, a linear with LoRA is six nodes with twenty views and casts between them, and at
short context a step waits for the CPU that walks them. The products and their dtypes are the same here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.shapes import LoraFactors


def lora_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, adapter: LoraFactors) -> Tensor:
    """`F.linear(x, weight, bias) + s · x Aᵀ Bᵀ`, `(…, O)` in the dtype of the weight.

    Args:
        x: `(…, I)`, in the dtype of the weight, which under autocast is autocast's.
        weight_OI: frozen.
        bias_O: frozen, or None.
        adapter: factors `(R, I)` and `(O, R)`, cast to the dtype of the weight; they receive gradients.
    """
    return _LoraLinear.apply(  # type: ignore[no-untyped-call,no-any-return]
        x, weight_OI, bias_O, adapter.a, adapter.b, adapter.scale
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        dtype = weight_OI.dtype
        x_NI, a, b = x.reshape(-1, x.shape[-1]), a_RI.to(dtype), b_OR.to(dtype)
        mid_NR = x_NI @ a.mT
        y_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(mid_NR, b.mT, alpha=scale)
        ctx.save_for_backward(x_NI, mid_NR, weight_OI, a, b)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a_RI.dtype, b_OR.dtype)
        return y_NO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, mid_NR, weight_OI, a, b = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx = da = db = None
        if wants_x or wants_a:
            dmid_NR = (dy_NO @ b).mul_(ctx.scale)
            if wants_x:
                dx = (dy_NO @ weight_OI).addmm_(dmid_NR, a).view(ctx.shape)
            if wants_a:
                da = (dmid_NR.mT @ x_NI).to(ctx.dtypes[0])
        if wants_b:
            db = (dy_NO.mT @ mid_NR).to(ctx.dtypes[1]).mul_(ctx.scale)
        return dx, None, None, da, db, None
