"""The walk of a batch through the experts of one layer, forward and backward, over any backend's products.

    h[n] = x[t(n)] W1[e(n)] + s (x[t(n)] A1[e(n)]ᵀ) B1[e(n)]ᵀ + b1[e(n)]      gate_up
    a[n] = gate(h[n])
    y[n] = a[n] W2[e(n)] + s (a[n] A2[e(n)]ᵀ) B2[e(n)]ᵀ + b2[e(n)]            down
    out[t] = Σ_k weight[t, k] · y[row(t, k)]                                   combine

`W + s·BA` is never formed (Split LoRA). Kept for backward: `x_TD`, `h_NG`, the two LoRA mids `(N, R)` and four words a
routed row: `2D + K(4F + 4R + 16)` bytes a token in bfloat16. `a` is computed again; `y` is never needed, because
`⟨dout, y⟩ = ⟨a, da⟩ + ⟨dout, b2⟩` (Guo et al. 2025, "SonicMoE"). A frozen weight gets no gradient and keeps no input.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import lora
from expertune.activations import Gate
from expertune.backends.protocol import Backend
from expertune.routing import Dispatch, combine, dispatch, sum_rows
from expertune.shapes import ExpertsLayout, LoraFactors
from expertune.weights.dense import DenseWeights


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One of the two linears of the experts.

    Args:
        weight: `(E, O, I)`, or `(E, I, O)` where the layout is transposed.
        bias: `(E, O)` or None.
        adapters: the active LoRA adapters, in the order in which they are joined.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[LoraFactors, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertsStep:
    """What stays the same from batch to batch: how the experts lie, their gate, and the backend that multiplies."""

    layout: ExpertsLayout
    gate: Gate
    backend: Backend


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, projections: tuple[Projection, Projection], step: ExpertsStep
) -> Tensor:
    """The sum over each token's experts of their outputs, weighted by the router: `(T, D)` in the dtype of `x_TD`.

    Args:
        x_TD: the tokens; cast to the dtype of the base weights.
        expert_TK: the experts that the router chose, integers below `E`.
        weight_TK: the router's weights, any floating dtype; they receive a gradient.
        projections: gate_up (or up) and down.
        step: layout, gate and backend.

    Differentiable in `x_TD`, `weight_TK`, base weights, biases and LoRA factors, each only where it asks for it.
    """
    first, second = projections
    factors = [factor for p in projections for adapter in p.adapters for factor in (adapter.a, adapter.b)]
    walk = _Walk(
        step=step,
        routing=dispatch(expert_TK, step.layout.num_experts),
        scales=tuple(tuple(adapter.scale for adapter in p.adapters) for p in projections),
    )
    base = (first.weight, first.bias, second.weight, second.bias)
    # autocast would cast some products and not others; the dtype of the base weights is the one that counts
    with torch.autocast(x_TD.device.type, enabled=False):
        out_TD = _ExpertsFunction.apply(  # type: ignore[no-untyped-call]
            walk, x_TD.to(first.weight.dtype), weight_TK, *base, *factors
        )
    return cast(Tensor, out_TD).to(x_TD.dtype)


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """All that is not a differentiable tensor."""

    step: ExpertsStep
    routing: Dispatch
    scales: tuple[tuple[float, ...], ...]

    def projections(self, tensors: tuple[Tensor | None, ...]) -> "tuple[_Linear, _Linear]":
        """Both linears, from the flat arguments `w1, b1, w2, b2, a, b, a, b, …` of the autograd function."""
        w1, b1, w2, b2, *factors = tensors
        flat = iter(factors)
        adapters = [
            tuple(LoraFactors(a=cast(Tensor, next(flat)), b=cast(Tensor, next(flat)), scale=s) for s in scales)
            for scales in self.scales
        ]
        transposed = self.step.layout.is_transposed
        return (
            _Linear(self, DenseWeights(cast(Tensor, w1), transposed), b1, adapters[0]),
            _Linear(self, DenseWeights(cast(Tensor, w2), transposed), b2, adapters[1]),
        )


@dataclass(frozen=True)
class _Linear:
    """A projection during one pass: the grouped linear with Split LoRA, and its gradients."""

    walk: _Walk
    weights: DenseWeights
    bias_EO: Tensor | None
    adapters: tuple[LoraFactors, ...]

    def forward(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """`y_NO` and, with adapters, the mid `x Aᵀ`, `(N, R)`."""
        matmul, routing = self.walk.step.backend.matmul, self.walk.routing
        y_NO = matmul(x_NI, self.weights.w_EIO, routing.ends_E)
        mid_NR = None
        if self.adapters:
            a_ERI, b_EOR = lora.pack(self.adapters, self.walk.step.layout.num_experts, x_NI.dtype)
            mid_NR = matmul(x_NI, a_ERI.mT, routing.ends_E)
            y_NO.add_(matmul(mid_NR, b_EOR.mT, routing.ends_E))
        if self.bias_EO is not None:
            y_NO.add_(self.bias_EO.to(y_NO.dtype).index_select(0, routing.row_expert_N))
        return y_NO, mid_NR

    def input_grad(self, dy_NO: Tensor) -> tuple[Tensor, Tensor | None]:
        """`dx_NI` and, with adapters, the gradient of the mid."""
        matmul, ends_E = self.walk.step.backend.matmul, self.walk.routing.ends_E
        dx_NI = matmul(dy_NO, self.weights.w_EOI, ends_E)
        dmid_NR = None
        if self.adapters:
            a_ERI, b_EOR = lora.pack(self.adapters, self.walk.step.layout.num_experts, dy_NO.dtype)
            dmid_NR = matmul(dy_NO, b_EOR, ends_E)
            dx_NI.add_(matmul(dmid_NR, a_ERI, ends_E))
        return dx_NI, dmid_NR

    def weight_grad(self, dy_NO: Tensor, x_NI: Tensor) -> Tensor:
        """`dW` in the host's layout. Only called where the weight is trained."""
        u, v = (x_NI, dy_NO) if self.weights.is_transposed else (dy_NO, x_NI)
        return self.walk.step.backend.outer(u, v, self.walk.routing.ends_E)

    def bias_grad(self, dy_NO: Tensor, weight_N1: Tensor | None) -> Tensor:
        """`(E, O)`: each expert's rows summed, as a product with a column so that the order is fixed."""
        column_N8 = dy_NO.new_ones((dy_NO.shape[0], lora.RANK_MULTIPLE))
        if weight_N1 is not None:
            column_N8.mul_(weight_N1)
        return self.walk.step.backend.outer(dy_NO, column_N8, self.walk.routing.ends_E)[:, :, 0]

    def factor_grads(self, dy_NO: Tensor, x_NI: Tensor, mid_NR: Tensor, dmid_NR: Tensor) -> list[Tensor]:
        """`da, db` of every adapter, in PEFT's layout, in the order of the flat arguments."""
        outer, ends_E = self.walk.step.backend.outer, self.walk.routing.ends_E
        das = lora.unpack_a_grads(outer(dmid_NR, x_NI, ends_E), self.adapters)
        dbs = lora.unpack_b_grads(outer(dy_NO, mid_NR, ends_E), self.adapters)
        return [grad for pair in zip(das, dbs, strict=True) for grad in pair]


class _ExpertsFunction(torch.autograd.Function):
    """Arguments: walk, x, weight, w1, b1, w2, b2, then `a, b` of every adapter of the first and second projection."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, x_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        routing, (first, second) = walk.routing, walk.projections(tensors)
        h_NG, mid1_NR = first.forward(x_TD.index_select(0, routing.row_token_N))
        y_ND, mid2_NR = second.forward(walk.step.gate.forward(h_NG))
        out_TD = combine(y_ND, weight_TK, routing.token_row_TK)

        needs_first, needs_second = _needs_factors(ctx, walk)
        ctx.walk = replace(walk, routing=cast(Dispatch, None))  # its tensors are kept by save_for_backward
        ctx.weight_dtype = weight_TK.dtype
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(
            x_TD if ctx.needs_input_grad[3] or needs_first else None,
            h_NG,
            mid1_NR if needs_first else None,
            mid2_NR if needs_second else None,
            weight_TK.to(torch.promote_types(weight_TK.dtype, torch.float32)),
            routing.row_token_N,
            routing.row_expert_N,
            routing.token_row_TK,
            routing.ends_E,
            *tensors,
        )
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, h_NG, mid1_NR, mid2_NR, weight_TK, row_token_N, row_expert_N, token_row_TK, ends_E, *tensors = (
            ctx.saved_tensors
        )
        routing = Dispatch(row_token_N=row_token_N, row_expert_N=row_expert_N, token_row_TK=token_row_TK, ends_E=ends_E)
        walk: _Walk = replace(ctx.walk, routing=routing)
        first, second = walk.projections(tuple(tensors))
        _, wants_x, wants_weight, wants_w1, wants_b1, wants_w2, wants_b2, *_ = ctx.needs_input_grad
        needs_first, needs_second = _needs_factors(ctx, walk)

        # Down. The router's weight of a row multiplies the narrow side of every product, never a (N, D) tensor.
        weight_N1 = torch.empty_like(weight_TK).view(-1, 1)
        weight_N1.index_copy_(0, token_row_TK.view(-1).long(), weight_TK.view(-1, 1))
        weight_N1 = weight_N1.to(dout_TD.dtype)
        dout_ND = dout_TD.index_select(0, row_token_N)
        da_NF, dmid2_NR = second.input_grad(dout_ND)
        a_NF, dh_NG = walk.step.gate.backward(h_NG, da_NF * weight_N1)
        dweight_TK = _router_grad(walk, dout_TD, a_NF, da_NF, second.bias_EO) if wants_weight else None
        db2 = second.bias_grad(dout_ND, weight_N1) if wants_b2 else None
        dw2 = second.weight_grad(dout_ND, a_NF * weight_N1) if wants_w2 else None
        grads2: list[Tensor] = []
        if needs_second:
            grads2 = second.factor_grads(dout_ND, a_NF, mid2_NR * weight_N1, cast(Tensor, dmid2_NR) * weight_N1)
        del dout_ND, da_NF, a_NF

        # gate_up
        dx_ND, dmid1_NR = first.input_grad(dh_NG) if wants_x or needs_first else (None, None)
        dx_TD = sum_rows(cast(Tensor, dx_ND), token_row_TK) if wants_x else None
        del dx_ND
        db1 = first.bias_grad(dh_NG, None) if wants_b1 else None
        x_ND = x_TD.index_select(0, row_token_N) if wants_w1 or needs_first else None
        dw1 = first.weight_grad(dh_NG, cast(Tensor, x_ND)) if wants_w1 else None
        grads1: list[Tensor] = []
        if needs_first:
            grads1 = first.factor_grads(dh_NG, cast(Tensor, x_ND), mid1_NR, cast(Tensor, dmid1_NR))

        if dweight_TK is not None:
            dweight_TK = dweight_TK.to(ctx.weight_dtype)
        factor_grads = (grads1 or [None] * 2 * len(first.adapters)) + (grads2 or [None] * 2 * len(second.adapters))
        return (None, dx_TD, dweight_TK, dw1, db1, dw2, db2, *factor_grads)


def _needs_factors(ctx: Any, walk: _Walk) -> tuple[bool, bool]:
    """Whether any LoRA factor of the first and of the second projection wants a gradient."""
    wants = ctx.needs_input_grad[7:]
    cut = 2 * len(walk.scales[0])
    return any(wants[:cut]), any(wants[cut:])


def _router_grad(walk: _Walk, dout_TD: Tensor, a_NF: Tensor, da_NF: Tensor, bias_EO: Tensor | None) -> Tensor:
    """`⟨dout, y⟩` of every row, `(T, K)`, without `y`: `da_NF` is the gradient before the router's weight."""
    routing = walk.routing
    rows_TK = routing.token_row_TK.view(-1)
    accumulate = torch.promote_types(a_NF.dtype, torch.float32)
    dweight_N = (a_NF * da_NF).sum(-1, dtype=accumulate)
    dweight_TK = dweight_N.index_select(0, rows_TK).view_as(routing.token_row_TK)
    if bias_EO is not None:
        dout_bias_TE = (dout_TD @ bias_EO.to(dout_TD.dtype).mT).to(accumulate)
        expert_TK = routing.row_expert_N.index_select(0, rows_TK).view_as(routing.token_row_TK)
        dweight_TK = dweight_TK + dout_bias_TE.gather(1, expert_TK.long())
    return dweight_TK
