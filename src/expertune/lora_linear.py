"""Split LoRA of one frozen linear, `xW + s(xA)B`, as one node of autograd.

Written with PEFT's own operations, a linear with LoRA is six nodes with twenty views and casts between them, and at
short context a step waits for the CPU that walks them. The products and their dtypes are the same here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import prepare
from expertune.shapes import LoraFactors
from expertune.split_linear import SplitLinear


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
        narrow_a_RI, narrow_b_OR = prepare.cast((a_RI, b_OR), dtype)
        linear = SplitLinear(weight_OI, bias_O, narrow_a_RI, narrow_b_OR, scale, (a_RI.dtype, b_OR.dtype))
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = x_NI.new_empty((len(x_NI), len(weight_OI)))
        mid_NR = linear.forward(x_NI, y_NO)
        ctx.save_for_backward(x_NI, mid_NR, weight_OI, linear.a_RI, linear.b_OR)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, linear.dtypes
        return y_NO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, mid_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        linear = SplitLinear(weight_OI, None, a_RI, b_OR, ctx.scale, ctx.dtypes)
        wants_x, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dmid_NR = linear.dmid(dy_NO) if wants_x or wants_a else None
        dx = linear.input_grad(dy_NO, dmid_NR).view(ctx.shape) if wants_x else None
        da = linear.a_grad(x_NI, dmid_NR) if wants_a else None
        db = linear.b_grad(dy_NO, mid_NR) if wants_b else None
        return dx, None, None, da, db, None
