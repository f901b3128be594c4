"""Log-probabilities of labels under a frozen head, with the logits of some tokens at a time.

    log p(label | h), where z = cap(h Wᵀ + b) and log p = z[label] − log Σ exp z

A token's log-probability depends on no other token, so its gradient is computed while its logits are there, up to the
factor that backward brings: two products with the head a step, where a head that computes its logits again in backward
takes three. Liger Kernel (Hsu et al. 2024) does so for the mean of a batch; here each token keeps a gradient of its
own, because a trainer weights tokens after the fact. The last of these products has no part in what is returned, and
whoever reads that, as a trainer reads its metrics, need not wait for it.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import kernels
from expertune.aside import set_aside

# Whose logits are there at once: 300 MB at 151,936 tokens of vocabulary in 16 bits. Products with 1,024 rows fill one
# wave of an H100 in the narrower direction, 2,048 columns.
NUM_TOKENS = 1024


class Head(NamedTuple):
    """The head of a language model, and what comes between its product and the softmax.

    Args:
        weight_VD: frozen.
        bias_V: frozen, or None.
        scale: of the logits.
        softcap: logits `z` become `softcap · tanh(z / softcap)`; None for none.
        inv_t: 1 / temperature, after the cap.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    inv_t: float = 1.0

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """`z_TV` in float32, or in float64 if that is the hidden states'."""
        y = torch.nn.functional.linear(hidden_TD, self.weight_VD, self.bias_V)
        return self.cap(_wide(y))

    def cap(self, y_TV: Tensor) -> Tensor:
        """`z_TV` of the product."""
        y_TV = y_TV * self.scale
        if self.softcap is not None:
            y_TV = self.softcap * torch.tanh(y_TV / self.softcap)
        return y_TV * self.inv_t

    def slope(self, y_TV: Tensor) -> Tensor | float:
        """`∂z / ∂y`, element by element."""
        if self.softcap is None:
            return self.scale * self.inv_t
        return self.scale * self.inv_t * (1 - torch.tanh(y_TV * self.scale / self.softcap) ** 2)


def label_log_probs(hidden_ND: Tensor, label_N: Tensor, head: Head, last: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: the log-probability of its label, the entropy of its distribution, whether the label is likeliest.

    The first two can be differentiated with respect to the hidden states; for the entropy, which few losses ask for,
    the logits are computed again.

    Args:
        hidden_ND: in the dtype of the head's weight.
        label_N: int64, each in 0 … V−1.
        head: frozen.
        last: tokens whose logits are there at once at the end, and whose gradient a GPU sets aside.

    Returns:
        `log_prob_N` and `entropy_N` in float32, or in float64 if that is the hidden states', and `is_top1_N` in bool.
    """
    return _LabelLogProbs.apply(hidden_ND, label_N, head, last)  # type: ignore[no-untyped-call,no-any-return]


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, label_N: Tensor, head: Head, last: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        hidden_ND = hidden_ND.contiguous()
        num_tokens, weight_VD = len(hidden_ND), head.weight_VD
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        log_prob_N, entropy_N = (hidden_ND.new_empty(num_tokens, dtype=wide) for _ in range(2))
        is_top1_N = hidden_ND.new_empty(num_tokens, dtype=torch.bool)
        wants_gradient = ctx.needs_input_grad[0]
        sizes = (max(0, num_tokens - last), min(num_tokens, last)) if wants_gradient else (0, 0)
        gradient_ND, ctx.last_TD = (hidden_ND.new_empty(size, hidden_ND.shape[1]) for size in sizes)
        fold = _kernel if kernels.computes(hidden_ND) else _plain
        parts = _parts(num_tokens, len(ctx.last_TD))
        buffer_TV = hidden_ND.new_empty(max((part.stop - part.start for part in parts), default=0), len(weight_VD))
        ctx.aside = None
        for part in parts:
            y_TV = buffer_TV[: part.stop - part.start]
            if head.bias_V is None:
                torch.mm(hidden_ND[part], weight_VD.mT, out=y_TV)
            else:
                torch.addmm(head.bias_V, hidden_ND[part], weight_VD.mT, out=y_TV)
            outs = log_prob_N[part], entropy_N[part], is_top1_N[part]
            fold(y_TV, label_N[part], outs, head, writes_gradient=wants_gradient)
            if wants_gradient and part.start < len(gradient_ND):
                torch.mm(y_TV, weight_VD, out=gradient_ND[part])
            elif wants_gradient:
                # what is saved may be copied at once, by who keeps it elsewhere; this is not there yet
                of_last = partial(torch.mm, y_TV, weight_VD, out=ctx.last_TD)
                ctx.aside = set_aside(of_last, (y_TV, weight_VD, ctx.last_TD))
        ctx.save_for_backward(hidden_ND, gradient_ND)
        ctx.head = head
        ctx.mark_non_differentiable(is_top1_N)
        return log_prob_N, entropy_N, is_top1_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlog_prob_N: Tensor | None, dentropy_N: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None]:
        hidden_ND, gradient_ND = ctx.saved_tensors
        dx_ND = None
        if dlog_prob_N is not None:
            if ctx.aside is not None:
                ctx.aside.wait()
            dx_ND, dlog_prob_N1, before = torch.empty_like(hidden_ND), dlog_prob_N.unsqueeze(1), len(gradient_ND)
            torch.mul(gradient_ND, dlog_prob_N1[:before], out=dx_ND[:before])
            torch.mul(ctx.last_TD, dlog_prob_N1[before:], out=dx_ND[before:])
        if dentropy_N is not None:
            of_entropy_ND = _entropy_backward(hidden_ND, dentropy_N, ctx.head)
            dx_ND = of_entropy_ND if dx_ND is None else dx_ND + of_entropy_ND
        return dx_ND, None, None, None


def _parts(num_tokens: int, last: int) -> list[slice]:
    """Tokens whose logits are there at once; the last part is that of the `last` tokens, if any."""
    rest = num_tokens - last
    parts = [slice(start, min(start + NUM_TOKENS, rest)) for start in range(0, rest, NUM_TOKENS)]
    return [*parts, slice(rest, num_tokens)] if last else parts


def _entropy_backward(hidden_ND: Tensor, dentropy_N: Tensor, head: Head) -> Tensor:
    dx_ND = torch.empty_like(hidden_ND)
    for start in range(0, len(hidden_ND), NUM_TOKENS):
        part = slice(start, start + NUM_TOKENS)
        with torch.enable_grad():
            leaf_TD = hidden_ND[part].detach().requires_grad_()
            log_p_TV = head.logits(leaf_TD).log_softmax(-1)
            entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
        (dx_ND[part],) = torch.autograd.grad(entropy_T, leaf_TD, dentropy_N[part])
    return dx_ND


def _plain(
    y_TV: Tensor, label_T: Tensor, outs: tuple[Tensor, Tensor, Tensor], head: Head, *, writes_gradient: bool
) -> None:
    """The kernel's work by torch's own operations, on any device."""
    wide_TV = _wide(y_TV)
    z_TV = head.cap(wide_TV)
    log_p_TV = z_TV.log_softmax(-1)
    label_T1 = label_T.unsqueeze(1)
    log_prob_T, entropy_T, is_top1_T = outs
    log_prob_T.copy_(log_p_TV.gather(1, label_T1).squeeze(1))
    p_TV = log_p_TV.exp()
    entropy_T.copy_(-(p_TV * log_p_TV).sum(-1))
    is_top1_T.copy_(z_TV.argmax(-1) == label_T)
    if writes_gradient:
        one_TV = torch.zeros_like(p_TV).scatter_(1, label_T1, 1.0)
        y_TV.copy_((one_TV - p_TV) * head.slope(wide_TV))


def _kernel(
    y_TV: Tensor, label_T: Tensor, outs: tuple[Tensor, Tensor, Tensor], head: Head, *, writes_gradient: bool
) -> None:
    from expertune.kernels.log_probs import log_probs  # imports Triton, which is optional

    log_probs(
        y_TV,
        label_T,
        outs,
        scale=head.scale,
        softcap=head.softcap,
        inv_t=head.inv_t,
        writes_gradient=writes_gradient,
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
