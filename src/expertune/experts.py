"""The walk of a batch through the experts of one layer, forward and backward, over any backend's products.

    h[n] = x[t(n)] W1[e(n)] + s (x[t(n)] A1[e(n)]ᵀ) B1[e(n)]ᵀ + b1[e(n)]      gate_up
    a[n] = gate(h[n])
    y[n] = a[n] W2[e(n)] + s (a[n] A2[e(n)]ᵀ) B2[e(n)]ᵀ + b2[e(n)]            down
    out[t] = Σ_k weight[t, k] · y[row(t, k)]                                   combine

`W + s·BA` is never formed (Split LoRA). Kept for backward: `x_TD`, `h_NG`, the two LoRA mids `(N, R)` and four words a
routed row: `2D + K(4F + 4R + 16)` bytes a token in bfloat16; where asked for, the packed factors too. `a` is computed
again; `y` is never needed, because `⟨dout, y⟩ = ⟨a, da⟩ + ⟨dout, b2⟩` (Guo et al. 2025, "SonicMoE"). A frozen weight
gets no gradient and keeps no input.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import accumulate, prepare
from expertune.backends.protocol import FactorSide
from expertune.grouped_linear import GroupedLinear, pack
from expertune.shapes import Dispatch, Tensors
from expertune.walk import NUM_MADE, ExpertsStep, Made, Operands, Projection, Walk, flatten


def experts(
    x_TD: Tensor,
    routing: Dispatch,
    weight_TK: Tensor,
    projections: tuple[Projection, Projection],
    step: ExpertsStep,
    *,
    leaves_out: bool = False,
    keeps_packed: bool = False,
) -> Tensor:
    """The sum over each token's experts of their outputs, weighted by the router: `(T, D)` in the dtype of `x_TD`.

    Args:
        x_TD: the tokens; cast to the dtype of the base weights.
        routing: the rows that the router's choice makes, by `step.dispatch`.
        weight_TK: the router's weights, any floating dtype; they receive a gradient.
        projections: gate_up (or up) and down.
        step: layout, gate and backend.
        leaves_out: yield zeros, with the right gradient: for a recomputation whose output nobody reads.
        keeps_packed: keep the packed factors for backward, as large as the adapters in the dtype of the base weights,
            instead of packing them again: for a recomputation, whose backward is next, or where there is room.

    Differentiable in `x_TD`, `weight_TK`, base weights, biases and LoRA factors, each only where it asks for it.
    """
    tensors, scales = flatten(projections)
    walk = Walk(step=step, scales=scales, routing=routing.shape, leaves_out=leaves_out, keeps_packed=keeps_packed)
    out_TD = _ExpertsFunction.apply(  # type: ignore[no-untyped-call]
        walk, x_TD.to(projections[0].weight.dtype), weight_TK, routing.words, *tensors
    )
    return cast(Tensor, out_TD).to(x_TD.dtype)


def _pack(walk: Walk, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """The packed factors as `Made` holds them, from `w1, b1, w2, b2` and the factors."""
    _, first, second = walk.linears((None, *tensors))
    packed1, packed2 = pack(first, second)
    return (*first.held(packed1), *second.held(packed2))


def _forward(walk: Walk, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """`out_TD`, or None where it is left out, and `Made`, but for packed factors that are given behind the others."""
    x_TD, weight_TK, *others = cast(tuple[Tensor, ...], tensors)
    steps = walk.step.backend.steps()
    parts, given = others[: 1 + walk.num_parts], others[1 + walk.num_parts :]
    routing, first, second = walk.linears(parts)
    packed1, packed2 = (first.packed(*given[:2]), second.packed(*given[2:])) if given else pack(first, second)
    held = (*first.held(packed1), *second.held(packed2)) if walk.keeps_packed and not given else ()
    del others, given
    x_ND, mid1_NR = steps.gather(x_TD, None if packed1 is None else packed1.a_ERI, routing)
    h_NG, a_NF = first.gated(walk.step.gate, x_ND, packed1, mid1_NR)
    del x_ND, packed1
    mid2_NR = None if packed2 is None else steps.shrink(a_NF, packed2.a_ERI, routing)
    if walk.leaves_out:
        return None, *Made(h_NG, mid1_NR, mid2_NR, *held)
    y_ND = second.forward(a_NF, packed2, mid2_NR)
    del a_NF, packed2
    return steps.combine(y_ND, weight_TK, routing), *Made(h_NG, mid1_NR, mid2_NR, *held)


def _backward(walk: Walk, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """Gradients of `x, weight, w1, b1, w2, b2`, then of the factors, but None for what is added to a sum.

    Of `weight` only `⟨a, da⟩`; `_bias_part` is missing. In place of the factors' there may be `Operands`.
    """
    dout_TD, x_TD, *others = cast(tuple[Tensor, ...], tensors[: -walk.num_parts])
    h_NG, mid1_NR, mid2_NR, *held = others[:NUM_MADE]
    weight_TK, *others = others[NUM_MADE:]
    steps = walk.step.backend.steps()
    routing, first, second = walk.linears(others)
    wants_x, wants_weight, wants_w1, wants_b1, wants_w2, wants_b2 = walk.wants[:6]
    wants_first, wants_second = (wants and not walk.postpones for wants in walk.wants_factors)
    sum1, _, sum2, _, *sums = tensors[-walk.num_parts :]
    cut = 2 * len(first.adapters)
    dx_TD = dw1 = db1 = dw2 = db2 = None
    dfirst: list[Tensor | None] = [None] * cut
    dsecond: list[Tensor | None] = [None] * (len(sums) - cut)

    # Down. The router's weight of a row multiplies the narrow side of every product, never a (N, D) tensor.
    packed1, packed2 = (first.packed(*held[:2]), second.packed(*held[2:])) if walk.keeps_packed else pack(first, second)
    del held
    dout_ND, dmid2_NR = steps.gather(dout_TD, None if packed2 is None else packed2.b_EOR.mT, routing)
    a_NF, dh_NG, dweight_TK = second.gate_backward(
        walk.step.gate, dout_ND, packed2, dmid2_NR, h_NG, weight_TK, overwrites=walk.overwrites
    )
    del packed2, h_NG
    if wants_b2 or wants_w2:
        weight_N1 = routing.by_row(weight_TK).to(dout_TD.dtype)
        db2 = second.bias_grad(dout_ND, weight_N1) if wants_b2 else None
        dw2 = second.weight_grad(dout_ND, a_NF * weight_N1, sum2) if wants_w2 else None
    del dout_ND
    if wants_second:
        dsecond = _second_factors(second, a_NF, cast(Tensor, dmid2_NR), dout_TD, mid2_NR, weight_TK, sums[cut:])
    operands = (a_NF, dmid2_NR) if walk.postpones else ()
    del a_NF, mid2_NR, dmid2_NR

    # gate_up
    dmid1_NR = None if packed1 is None else steps.shrink(dh_NG, packed1.b_EOR.mT, routing)
    if wants_x:
        dx_TD = steps.combine(first.input_grad(dh_NG, packed1, dmid1_NR), None, routing)
    del packed1
    db1 = first.bias_grad(dh_NG, None) if wants_b1 else None
    if wants_w1:
        dw1 = first.weight_grad(dh_NG, x_TD.index_select(0, routing.row_token_N), sum1)
    if wants_first:
        dfirst = _first_factors(first, x_TD, cast(Tensor, dmid1_NR), dh_NG, mid1_NR, sums[:cut])
    dfactors = Operands(*operands, dh_NG, dmid1_NR) if operands else (*dfirst, *dsecond)
    return (dx_TD, dweight_TK if wants_weight else None, dw1, db1, dw2, db2, *dfactors)


def _first_factors(
    first: GroupedLinear, x_TD: Tensor, dmid_NR: Tensor, dh_NG: Tensor, mid_NR: Tensor, sums: Tensors
) -> list[Tensor | None]:
    """The gradients of gate_up's factors."""
    a, b = FactorSide(x_TD, dmid_NR, by_token=True), FactorSide(dh_NG, mid_NR)
    return first.steps.factor_grads(a, b, first.adapters, first.routing, sums)


def _second_factors(
    second: GroupedLinear,
    a_NF: Tensor,
    dmid_NR: Tensor,
    dout_TD: Tensor,
    mid_NR: Tensor,
    weight_TK: Tensor,
    sums: Tensors,
) -> list[Tensor | None]:
    """The gradients of down's factors."""
    a, b = FactorSide(a_NF, dmid_NR), FactorSide(dout_TD, mid_NR, by_token=True)
    return second.steps.factor_grads(a, b, second.adapters, second.routing, sums, weight_TK)


def _factors(walk: Walk, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """The gradients of all factors, but None for what is added to a sum: what `_backward` has left out.

    From `x_TD`, both mids, the router's weights, the words and the parts; then the gradient of the output, `Operands`
    and the sums.
    """
    others, sums = tensors[: -walk.num_factors], tensors[-walk.num_factors :]
    *saved, dout_TD, a_NF, dmid2_NR, dh_NG, dmid1_NR = cast(tuple[Tensor, ...], others)
    x_TD, mid1_NR, mid2_NR, weight_TK, *parts = saved
    _, first, second = walk.linears(parts)
    cut = 2 * len(first.adapters)
    dfirst = _first_factors(first, x_TD, dmid1_NR, dh_NG, mid1_NR, sums[:cut]) if cut else []
    dsecond = (
        _second_factors(second, a_NF, dmid2_NR, dout_TD, mid2_NR, weight_TK, sums[cut:]) if second.adapters else []
    )
    return (*dfirst, *dsecond)


def _forward_and_backward(walk: Walk, tensors: Tensors) -> tuple[Tensor | None, ...]:
    """Both passes as they will be launched, without their numbers; `tensors` as for `_forward`.

    Whether the tokens want a gradient is not known in a checkpointed forward pass; nearly always they do. Backward may
    write over what was saved, so that it takes no more memory than forward.
    """
    out_TD, *made = _forward(walk, tensors)
    x_TD, weight_TK, words, *others = cast(tuple[Tensor, ...], tensors)
    parts, packed = others[: walk.num_parts], others[walk.num_parts :]
    made = [*made[: NUM_MADE - len(packed)], *packed]
    wants = [tensor is not None and tensor.requires_grad for tensor in parts]
    if x_TD.requires_grad or any(wants):
        walk = walk._replace(wants=(True, True, *wants), overwrites=True)
        dout_TD = torch.empty_like(x_TD)
        no_sums = [None] * len(parts)
        _backward(walk, (dout_TD, x_TD, *made, weight_TK, words, *parts, *no_sums))
    return (out_TD,)


def run_forward(
    walk: Walk, x_TD: Tensor, weight_TK: Tensor, tensors: Tensors, packed: Tensors = ()
) -> tuple[Tensor | None, ...]:
    """`_forward`, as the backend runs it: the output, if it is not left out, and `Made`.

    Args:
        walk: what else it needs.
        x_TD: the tokens, in the dtype of the base weights.
        weight_TK: the router's weights, contiguous.
        tensors: the routing's words, then `w1, b1, w2, b2`, then the factors.
        packed: the packed factors as `Made` holds them, if they were made beforehand; they are kept.
    """
    inputs = (x_TD, weight_TK, *tensors, *packed)
    out_TD, *made = walk.step.backend.steps().run(_forward, walk, inputs, ahead=_forward_and_backward)
    return (out_TD, *made[: NUM_MADE - len(packed)], *packed)


def kept(walk: Walk, x_TD: Tensor, weight_TK: Tensor, made: Tensors, tensors: Tensors) -> Tensors:
    """What `run_backward` takes as saved, with None for what no gradient that is wanted reads.

    Args:
        walk: says what is wanted.
        x_TD: the tokens, as in forward.
        weight_TK: the router's weights, as in forward.
        made: as `run_forward` gives it.
        tensors: as in forward.
    """
    h_NG, mid1_NR, mid2_NR, *held = made
    wants_first, wants_second = walk.wants_factors
    return (
        x_TD if walk.wants[2] or wants_first else None,
        h_NG,
        mid1_NR if wants_first else None,
        mid2_NR if wants_second else None,
        *held,
        weight_TK,
        *tensors,
    )


def run_backward(
    walk: Walk, dout_TD: Tensor, saved: Tensors, sums: Sequence[Tensor | None] | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of `x, weight, w1, b1, w2, b2`, then of the factors; None where `walk.wants` none.

    Args:
        walk: what else it needs.
        dout_TD: the gradient of the output.
        saved: as `kept` gives it.
        sums: of `w1, b1, w2, b2` and the factors each what its gradient is added to in place, contiguous, or None; the
            gradient is then None too. Those of biases are not added.
    """
    dout_TD = dout_TD.contiguous()
    sums = [None] * walk.num_parts if sums is None else sums
    dx_TD, dweight_TK, *others = walk.step.backend.steps().run(_backward, walk, (dout_TD, *saved, *sums))
    if dweight_TK is not None:
        weight_TK, words, _, _, _, b2, *_ = saved[1 + NUM_MADE :]
        if b2 is not None:
            part_TK = _bias_part(dout_TD, b2, Dispatch(walk.routing, cast(Tensor, words)))
            dweight_TK = dweight_TK + part_TK.to(dweight_TK.dtype)
        dweight_TK = dweight_TK.to(cast(Tensor, weight_TK).dtype)
    return (dx_TD, dweight_TK, *others)


class _ExpertsFunction(torch.autograd.Function):
    """Arguments: walk, x, weight, words, w1, b1, w2, b2, then `a, b` of each adapter of the two projections."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, x_TD: Tensor, weight_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        weight_TK = weight_TK.contiguous()
        packed = _packed_beforehand(walk, tensors[1:])
        walk = walk._replace(keeps_packed=walk.keeps_packed or bool(packed))
        out_TD, *made = run_forward(walk, x_TD, weight_TK, tensors, packed)
        _, wants_x, wants_weight, _, *wants = ctx.needs_input_grad
        ctx.walk = walk = walk._replace(wants=(wants_x, wants_weight, *wants))
        ctx.save_for_backward(*kept(walk, x_TD, weight_TK, made, tensors))
        if out_TD is None:
            out_TD = torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        walk: Walk = ctx.walk._replace(overwrites=not torch._C._autograd._get_current_graph_task_keep_graph())
        saved = ctx.saved_tensors
        factors = saved[len(saved) - walk.num_factors :]
        postponement = accumulate.postponement_of(factors) if walk.step.backend.steps().adds_in_place else None
        if postponement is not None:
            return _postpone(postponement, walk, dout_TD, saved)
        with accumulate.sums(ctx, saved[-walk.num_parts :]) as sums:
            dx_TD, dweight_TK, *others = run_backward(walk, dout_TD, saved, sums)
        return (None, dx_TD, dweight_TK, None, *others)


def _packed_beforehand(walk: Walk, parts: Tensors) -> Tensors:
    """The packed factors, of a pass that is recorded; else nothing."""
    factors = parts[4:]
    preparation = prepare.preparation_of(factors)
    if preparation is None:
        return ()
    return preparation.made(factors, partial(walk.step.backend.steps().run, _pack, walk, parts))


def _postpone(
    postponement: accumulate.Postponement, walk: Walk, dout_TD: Tensor, saved: Tensors
) -> tuple[Tensor | None, ...]:
    """The gradients of all but the factors, whose are left to whoever replays this pass."""
    dout_TD = dout_TD.contiguous()
    dx_TD, dweight_TK, *others = run_backward(walk._replace(postpones=True), dout_TD, saved)

    x_TD, _, mid1_NR, mid2_NR, *_ = saved
    postponement.postponed.append(
        accumulate.Postponed(
            leaves=cast(tuple[Tensor, ...], tuple(saved[-walk.num_factors :])),
            bind=partial(walk.step.backend.steps().bind, _factors, walk),
            saved=(x_TD, mid1_NR, mid2_NR, *saved[1 + NUM_MADE :]),
            made=(dout_TD, *others[4:]),
        )
    )
    return (None, dx_TD, dweight_TK, None, *others[:4], *[None] * walk.num_factors)


def _bias_part(dout_TD: Tensor, bias_EO: Tensor, routing: Dispatch) -> Tensor:
    """The bias's share of the router's gradient, `⟨dout, b2⟩` of every slot, `(T, K)`."""
    with torch.autocast(dout_TD.device.type, enabled=False):
        dout_bias_TE = dout_TD @ bias_EO.to(dout_TD.dtype).mT
    expert_TK = routing.row_expert_N.index_select(0, routing.token_row_TK.reshape(-1)).view_as(routing.token_row_TK)
    return dout_bias_TE.gather(1, expert_TK.long())
