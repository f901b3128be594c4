"""The walk as one operator, which `torch.compile` does not look into.

Its tracer follows Python that plain execution needs for speed: noted launches, threads, caches. So a compiled model
calls two operators with fake counterparts, which run the same two passes; the rows are sorted again in backward, which
keeps 8 bytes a slot instead of 12 a row. Plain execution never comes here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from expertune import lora
from expertune.experts import run_backward, run_forward
from expertune.shapes import LoraFactors
from expertune.walk import STEPS, ExpertsStep, Made, Projection, Walk, flatten

_SHARED = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor[] factors, float[] scales, int num_first, int step"


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, projections: tuple[Projection, Projection], step: ExpertsStep
) -> Tensor:
    """`experts.experts` for a compiled model, with the experts that the router chose instead of their rows.

    Args:
        x_TD: the tokens; cast to the dtype of the base weights.
        expert_TK: expert ids.
        weight_TK: the router's weights.
        projections: gate_up (or up) and down.
        step: layout, gate and backend.
    """
    (w1, b1, w2, b2, *factors), scales = flatten(projections)
    out_TD, *_ = torch.ops.expertune.experts(
        x_TD.to(projections[0].weight.dtype),
        expert_TK,
        weight_TK.contiguous(),
        w1,
        b1,
        w2,
        b2,
        factors,
        [*scales[0], *scales[1]],
        len(scales[0]),
        step.number,
    )
    return out_TD.to(x_TD.dtype)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "expertune::experts",
    mutates_args=(),
    schema=f"(Tensor x, Tensor expert, Tensor weight, {_SHARED}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x: Tensor, expert: Tensor, weight: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    """`out_TD`, `h_NG` and the two mids; empty where there is none."""
    walk, tensors = _walk(expert, *shared)
    with torch.no_grad():
        results = run_forward(walk, x, weight, tensors)[:4]
    return tuple(x.new_empty(0) if result is None else result.contiguous() for result in results)


@torch.library.custom_op(
    "expertune::experts_backward",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor x, Tensor h, Tensor mid1, Tensor mid2, Tensor expert, Tensor weight, "
        f"bool[] wants, {_SHARED}) -> Tensor[]"
    ),
)
def _backward(
    dout: Tensor,
    x: Tensor,
    h: Tensor,
    mid1: Tensor,
    mid2: Tensor,
    expert: Tensor,
    weight: Tensor,
    wants: Sequence[bool],
    *shared: Any,
) -> list[Tensor]:
    """Gradients of `x, weight, w1, b1, w2, b2`, then of the factors; empty where none is wanted."""
    walk, tensors = _walk(expert, *shared)
    walk = walk._replace(wants=tuple(wants))
    made = Made(h, *(mid if mid.numel() or not x.numel() else None for mid in (mid1, mid2)))
    with torch.no_grad(), _differentiable():
        grads = run_backward(walk, dout, (x, *made, weight, *tensors))
    return [x.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


def _differentiable() -> AbstractContextManager[Any]:
    """Let autograd see what runs inside, though an operator's kernel is below it: it differentiates a host's gates."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        left_out = left_out.remove(getattr(torch._C.DispatchKey, key))
    kept = torch._C._dispatch_tls_local_include_set()
    return cast(AbstractContextManager[Any], torch._C._ForceDispatchKeyGuard(kept, left_out))


def _walk(
    expert: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    num_first: int,
    step: int,
) -> tuple[Walk, tuple[Tensor | None, ...]]:
    routing = STEPS[step].dispatch(expert)
    walk = Walk(
        step=STEPS[step],
        scales=(tuple(scales[:num_first]), tuple(scales[num_first:])),
        routing=routing.shape,
    )
    return walk, (routing.words, w1, b1, w2, b2, *factors)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    x, expert, _, _, _, _, _, factors, _, num_first, step = inputs
    num_rows, layout = expert.shape[0] * expert.shape[1], STEPS[step].layout
    a = factors[::2]
    mids = []
    for held in (a[:num_first], a[num_first:]):
        rank = lora.joined_rank([LoraFactors(a=f, b=f, scale=1.0) for f in held], layout.num_experts)
        mids.append(x.new_empty((num_rows, rank)) if held else x.new_empty(0))
    return (x.new_empty(x.shape), x.new_empty((num_rows, layout.first_width)), *mids)


@_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    _, x, _, _, _, _, weight, wants, w1, b1, w2, b2, factors, *_ = inputs
    like = (x, weight, w1, b1, w2, b2, *factors)
    return [t.new_empty(t.shape) if is_wanted else x.new_empty(0) for t, is_wanted in zip(like, wants, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, expert, weight, w1, b1, w2, b2, factors, *rest = inputs
    _, h, mid1, mid2 = output
    ctx.rest = rest
    ctx.save_for_backward(x, h, mid1, mid2, expert, weight, w1, b1, w2, b2, *factors)
    ctx.mark_non_differentiable(h, mid1, mid2)


def _differentiate(ctx: Any, dout: Tensor, *_saved: Tensor) -> tuple[Any, ...]:
    x, h, mid1, mid2, expert, weight, w1, b1, w2, b2, *factors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = [needs[0], *needs[2:7], *needs[7]]
    grads = torch.ops.expertune.experts_backward(
        dout, x, h, mid1, mid2, expert, weight, wants, w1, b1, w2, b2, factors, *ctx.rest
    )
    dx, dweight, dw1, db1, dw2, db2, *dfactors = (g if want else None for g, want in zip(grads, wants, strict=True))
    no_scales: list[None] | None = None if factors else []  # torch takes an empty list for one of tensors
    return dx, None, dweight, dw1, db1, dw2, db2, dfactors, no_scales, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
