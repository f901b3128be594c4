"""Split LoRA of frozen linears that read the same tokens, `xW + s(xA)B` of each, as one node of autograd.

Written with PEFT's own operations, a linear with LoRA is six nodes with twenty views and casts between them, and at
short context a step waits for the CPU that walks them. The products and their dtypes are the same here. Of several,
such as queries, keys and values, the first factors lie one below the other: `xA` is one product, and so are what the
adapters add to the gradient of `x`, which all add up in place, and the gradient of the first factors.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import prepare
from expertune.split_linear import Linear, SplitLinear, add_product, product


def lora_linears(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """`F.linear(x, weight, bias) + s · x Aᵀ Bᵀ` of each, `(…, O)` in the dtype of the weights.

    Args:
        x: `(…, I)`, in the dtype of the weights, which under autocast is autocast's.
        linears: each with an adapter, whose factors are cast to the dtype of the weights, and receive gradients.
    """
    tensors: list[Tensor | None] = []
    scales = []
    for weight_OI, bias_O, adapter in linears:
        assert adapter is not None
        tensors += [weight_OI, bias_O, adapter.a, adapter.b]
        scales.append(adapter.scale)
    return _LoraLinears.apply(x, tuple(scales), *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _LoraLinears(torch.autograd.Function):
    """Arguments: x, the scales, then weight, bias, `a` and `b` of each linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, a, b = (tensors[i::4] for i in range(4))
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.shape = scales, x.shape
        ctx.dtypes = tuple((a_RI.dtype, b_OR.dtype) for a_RI, b_OR in zip(a, b, strict=True))
        ctx.ranks = [*map(len, a)]
        all_RI, *narrow_b = cast(list[Tensor], prepare.joined(a, b, x.dtype))
        x_NI = x.reshape(-1, x.shape[-1])
        mid_NR = x_NI @ all_RI.mT
        outs = [x.new_empty((*x.shape[:-1], len(weight_OI))) for weight_OI in weights]
        linears = _linears(ctx, weights, biases, all_RI, narrow_b)
        for linear, part_NR, out in zip(linears, torch.split(mid_NR, ctx.ranks, dim=1), outs, strict=True):
            linear.fill(out.view(-1, out.shape[-1]), x_NI, part_NR)
        ctx.save_for_backward(x_NI, mid_NR, all_RI, *weights, *narrow_b)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NI, mid_NR, all_RI, *rest = ctx.saved_tensors
        num = len(douts)
        if all(dy is None for dy in douts):
            return (None,) * len(ctx.needs_input_grad)
        wants_x, _, *wants = ctx.needs_input_grad
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in douts]
        linears = _linears(ctx, rest[:num], [None] * num, all_RI, rest[num:])
        dx: Tensor | None = None
        da: list[Tensor] = []
        if wants_x or any(wants[2::4]):
            dmid_NR = _dmid(linears, dys, ctx.ranks, mid_NR)
            dx = _input_grad(linears, dys, dmid_NR, all_RI).view(ctx.shape) if wants_x else None
            da = _a_grads(linears, dmid_NR, x_NI, ctx.ranks) if any(wants[2::4]) else []
        grads: list[Tensor | None] = []
        for i, part_NR in enumerate(torch.split(mid_NR, ctx.ranks, dim=1)):
            dy_NO, (wants_a, wants_b) = dys[i], wants[4 * i + 2 : 4 * i + 4]
            da_RI = da[i] if wants_a and dy_NO is not None else None
            grads += [None, None, da_RI, linears[i].b_grad(dy_NO, part_NR) if wants_b and dy_NO is not None else None]
        return dx, None, *grads


def _linears(ctx: Any, weights: Any, biases: Any, all_RI: Tensor, narrow_b: Any) -> list[SplitLinear]:
    each = zip(weights, biases, torch.split(all_RI, ctx.ranks), narrow_b, ctx.scales, ctx.dtypes, strict=True)
    return [SplitLinear(*parts) for parts in each]


def _dmid(linears: Sequence[SplitLinear], dys: Sequence[Tensor | None], ranks: list[int], mid_NR: Tensor) -> Tensor:
    """The gradients of all mids, side by side as these are."""
    if len(linears) == 1 and (dy_NO := dys[0]) is not None:
        return cast(Tensor, linears[0].dmid(dy_NO))
    dmid_NR = torch.empty_like(mid_NR)
    for linear, dy_NO, part_NR in zip(linears, dys, torch.split(dmid_NR, ranks, dim=1), strict=True):
        if dy_NO is None:
            part_NR.zero_()
        else:
            linear.dmid(dy_NO, part_NR)
    return dmid_NR


def _input_grad(
    linears: Sequence[SplitLinear], dys: Sequence[Tensor | None], dmid_NR: Tensor, all_RI: Tensor
) -> Tensor:
    dx_NI: Tensor | None = None
    for linear, dy_NO in zip(linears, dys, strict=True):
        if dy_NO is not None:
            dx_NI = linear.input_grad(dy_NO, None, dx_NI)
    assert dx_NI is not None
    add_product(dx_NI, dmid_NR, all_RI)
    return dx_NI


def _a_grads(linears: Sequence[SplitLinear], dmid_NR: Tensor, x_NI: Tensor, ranks: list[int]) -> list[Tensor]:
    dtypes = [linear.dtypes[0] for linear in linears]
    parts = torch.split(product(dmid_NR.mT, x_NI, reduce(torch.promote_types, dtypes)), ranks)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
