"""Attention as one node of autograd over any kernel, with sinks or without."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.attention import sinks
from expertune.attention.cudnn import Cudnn
from expertune.attention.flash import Flash
from expertune.attention.hopper import Hopper
from expertune.attention.kernels import Attended, Kernel, Pattern, choose
from expertune.attention.sequences import Sequences
from expertune.attention.tiles import Tiles

_WIDEST_SHARED = 256  # heads beyond it share no keys in any of torch's kernels but the one that forms all scores
BEYOND_SDPA: tuple[Kernel, ...] = (Hopper(),)  # faster than what torch chooses by itself, where they run
PREFERRED: tuple[Kernel, ...] = (*BEYOND_SDPA, Cudnn(), Flash(), Tiles())


def attend(
    q_BHTD: Tensor,
    k_BJSD: Tensor,
    v_BJSV: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    sequences: Sequences | None = None,
    mask: Tensor | None = None,
    overwrites: bool = False,
) -> Tensor:
    """Causal attention, `(B, T, H, V)`.

    Args:
        q_BHTD: queries.
        k_BJSD: keys; `H / J` heads of queries share one.
        v_BJSV: values.
        scale: of the products of queries and keys.
        window: keys that a query attends to at most, itself among them.
        sinks_H: a score of each head that takes a share of the softmax and gives nothing.
        sequences: which rows of the batch belong together; None for one sequence a sample, without padding.
        mask: `(B, 1 or H, T, S)`, bool or added to the scores, in place of causality, window and sequences.
        overwrites: whether backward may write over queries, keys and values, since nobody else has them.

    Raises:
        ValueError: there are more or fewer keys than queries, and no mask says which attend to which.
    """
    has_sinks = sinks_H is not None
    if mask is not None:
        return _attend(q_BHTD, k_BJSD, v_BJSV, sinks_H, Pattern(scale=scale, mask=mask, has_sinks=has_sinks))
    if q_BHTD.shape[2] != k_BJSD.shape[2]:
        raise ValueError(
            f"{q_BHTD.shape[2]} queries and {k_BJSD.shape[2]} keys came without a mask: with a cache of keys a mask "
            "must say which attend to which."
        )
    if window is not None and window >= q_BHTD.shape[2]:
        window = None
    if sequences is None and window is None and not has_sinks:
        return _plain(q_BHTD, k_BJSD, v_BJSV, Pattern(scale=scale, overwrites=overwrites))
    pattern = Pattern(scale=scale, window=window, sequences=sequences, has_sinks=has_sinks, overwrites=overwrites)
    if sequences is None:
        return _attend(q_BHTD, k_BJSD, v_BJSV, sinks_H, pattern)
    batch, _, length, _ = q_BHTD.shape
    q, k, v = (sequences.take(x) for x in (q_BHTD, k_BJSD, v_BJSV))
    return sequences.put(_attend(q, k, v, sinks_H, pattern)[0], batch, length)


def goes_beyond_sdpa(q_BHTD: Tensor, v_BJSV: Tensor) -> bool:
    """Whether for causal attention over whole samples a kernel of ours runs that is faster than torch's own choice."""
    if torch.compiler.is_compiling():
        return False
    pattern = Pattern(scale=1.0)
    return any(kernel.why_not(q_BHTD, v_BJSV, pattern) is None for kernel in BEYOND_SDPA)


def _plain(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """Torch's own choice, which no mask keeps from its fastest kernel, unless there is a faster one."""
    if goes_beyond_sdpa(q, v):
        return _attend(q, k, v, None, pattern)
    shares_heads = k.shape[1] != q.shape[1]
    if shares_heads and q.shape[-1] > _WIDEST_SHARED:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        shares_heads = False
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=pattern.scale, enable_gqa=shares_heads)
    return out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, pattern: Pattern) -> Tensor:
    kernel, _ = choose(PREFERRED, q, v, pattern)
    return _Attend.apply(q, k, v, sinks_H, pattern, kernel)  # type: ignore[no-untyped-call,no-any-return]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, pattern: Pattern, kernel: Kernel
    ) -> Tensor:
        out, lse, state = kernel.forward(q, k, v, pattern, sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, out, lse, *state)
        ctx.pattern, ctx.kernel = pattern, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, lse, *state = ctx.saved_tensors
        attended = Attended(out, lse, tuple(state))
        pattern: Pattern = ctx.pattern
        if pattern.overwrites:
            another_may_come = torch._C._autograd._get_current_graph_task_keep_graph()
            pattern = replace(pattern, overwrites=not another_may_come, overwrites_gradient=_is_recorded(dout))
        dsinks = sinks.gradient(dout, attended, sinks_H) if ctx.needs_input_grad[3] else None
        dq, dk, dv = ctx.kernel.backward(dout, q, k, v, attended, pattern)
        return dq, dk, dv, dsinks, None, None


def _is_recorded(dout: Tensor) -> bool:
    """Whether a CUDA graph is made of this backward: then no hook has been given the gradient."""
    return dout.is_cuda and torch.cuda.is_current_stream_capturing()
