"""What a router does with its logits: which experts a token goes to, and with what scores. One node of autograd.

Hosts write it in six operations where a softmax is taken, in twenty where sigmoids are, and half of them again in
backward; at short context a layer waits for the CPU that submits them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune.kernels import has_triton
from expertune.shapes import RoutingRule

_MOST_EXPERTS = 1024


def has_kernel(x: Tensor, num_experts: int, rule: RoutingRule) -> bool:
    """Whether our kernel computes a rule from numbers that lie where those of `x` do, in a dtype as theirs."""
    is_read = x.is_cuda and x.dtype != torch.float64 and num_experts <= _MOST_EXPERTS
    is_cut = rule.num_groups == 1 or all(n & (n - 1) == 0 for n in (num_experts, rule.num_groups))  # powers of two
    return is_read and is_cut and has_triton() and not torch.compiler.is_compiling()


def choose(logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule) -> Tensor:
    """The experts of each token, int64 `(T, K)`, the best first; of equals the first.

    Args:
        logits_TE: any floating dtype.
        bias_E: is added to what is compared, sigmoids or probabilities, not to scores; None for none.
        rule: of the router.
    """
    with torch.no_grad():
        return route(logits_TE.detach(), bias_E, rule)[1]


def route(
    logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule, index_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores in float32, or in float64 if that is the logits', `(T, K)`; and the experts, int64 `(T, K)`.

    The scores can be differentiated with respect to the logits.

    Args:
        logits_TE: any floating dtype.
        bias_E: as for `choose`.
        rule: of the router.
        index_TK: the experts, where they are chosen already.
    """
    if has_kernel(logits_TE, logits_TE.shape[1], rule):
        return _Route.apply(logits_TE, bias_E, rule, index_TK)  # type: ignore[no-untyped-call,no-any-return]
    return plain_route(logits_TE, bias_E, rule, index_TK)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule, index_TK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from expertune.kernels.router import route as kernel  # imports Triton, which is optional

        logits_TE, size = logits_TE.contiguous(), (len(logits_TE), rule.top_k)
        index = logits_TE.new_empty(size, dtype=torch.int64) if index_TK is None else index_TK.contiguous()
        score = logits_TE.new_empty(size, dtype=torch.float32)
        bias_E = bias_E.contiguous() if bias_E is not None and index_TK is None else None
        kernel(logits_TE, bias_E, index, score, rule, is_chosen=index_TK is not None)
        ctx.save_for_backward(logits_TE, index)
        ctx.rule = rule
        ctx.mark_non_differentiable(index)
        return score, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscore_TK: Tensor, _: None) -> tuple[Tensor | None, ...]:
        from expertune.kernels.router import route_backward

        logits_TE, index = ctx.saved_tensors
        dlogits = route_backward(logits_TE, index, dscore_TK.contiguous(), ctx.rule)
        return dlogits, None, None, None


def plain_route(
    logits_TE: Tensor, bias_E: Tensor | None, rule: RoutingRule, index_TK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The kernels' work by torch's own operations, on any device; for the arguments see `route`."""
    z = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    s_TE = z.sigmoid() if rule.is_sigmoid else z.softmax(-1)
    if index_TK is None:
        # far below the highest, scores are all zero; but it is scores that groups add up
        choice_TE = (z if rule.num_groups == 1 else s_TE) if bias_E is None else s_TE + bias_E
        index_TK = _best(_of_groups(choice_TE.detach(), rule), rule.top_k)
    score_TK = s_TE.gather(1, index_TK)
    if rule.is_normed:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + rule.eps)
    return score_TK * rule.scale, index_TK


def _best(x: Tensor, number: int) -> Tensor:
    """The places of the highest in the last dimension, of equals the first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :number].contiguous()


def _of_groups(choice_TE: Tensor, rule: RoutingRule) -> Tensor:
    """What is compared, -inf where a token does not use the group."""
    if rule.num_groups == 1:
        return choice_TE
    grouped_TGS = choice_TE.view(len(choice_TE), rule.num_groups, -1)
    score_TG = grouped_TGS.gather(2, _best(grouped_TGS, 2)).sum(-1)
    is_used_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, _best(score_TG, rule.top_groups), True)
    return grouped_TGS.masked_fill(~is_used_TG.unsqueeze(2), -float("inf")).flatten(1)
