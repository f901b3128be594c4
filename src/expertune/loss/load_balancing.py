"""The balance loss of routers (Switch Transformer, Fedus et al. 2021), of all layers at once.

loss = E · Σ_e f_e · P_e      f_e: how many of a row's top k go to expert e, P_e: its probability; both a mean over rows

The counts carry no gradient, so that of the logits is the softmax's, with one weight an expert: nothing but the logits
is kept for backward. The host walks layer by layer, a dozen launches each, forward and backward.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertune import kernels

NUM_ELEMENTS = 2**25  # of logits whose probabilities are there at once, 128 MiB in float32


def load_balancing_loss_func(
    gate_logits: tuple[Tensor, ...] | None,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor | int:
    """As Transformers' function of this name, whose arguments these are; probabilities in float32 or wider.

    Args:
        gate_logits: of each layer `(N, E)`, N = batch · sequence; None or not a tuple where a model has none.
        num_experts: E.
        top_k: experts a token.
        attention_mask: `(batch, sequence)`, 0 where a token is padding; None where none is.

    Returns:
        A scalar on the device of the first layer's logits; 0 without logits.
    """
    if gate_logits is None or not isinstance(gate_logits, tuple):
        return 0
    device = gate_logits[0].device
    mask_N = None if attention_mask is None else attention_mask.reshape(-1).to(device)
    logits = [each_NE.to(device) for each_NE in gate_logits]
    return _Balance.apply(top_k, num_experts, mask_N, *logits)  # type: ignore[no-untyped-call,no-any-return]


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_k: int, num_experts: int, mask_N: Tensor | None, *logits: Tensor) -> Tensor:
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        sums_2E = logits[0].new_zeros(2, num_experts, dtype=wide)
        sums, _ = _functions(logits[0])
        for group in _groups(logits):
            sums_2E += sums(torch.cat(group), top_k, mask_N)
        count_E, probability_E = sums_2E
        num_rows = (sum(map(len, logits)) or math.nan) if mask_N is None else mask_N.sum(dtype=wide) * len(logits)
        count_E *= num_experts / num_rows**2
        ctx.save_for_backward(count_E, mask_N, *logits)
        loss: Tensor = (count_E * probability_E).sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        count_E, mask_N, *logits = ctx.saved_tensors
        dmean_E = count_E * dloss
        dlogits: list[Tensor] = []
        _, gradient = _functions(logits[0])
        for group in _groups(logits):
            dlogits += torch.split(gradient(torch.cat(group), dmean_E, mask_N), [len(each) for each in group])
        return None, None, None, *dlogits


def _functions(logits_NE: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The sums and the gradient, by kernels or by torch's own operations."""
    if kernels.computes(logits_NE):
        from expertune.kernels.load_balancing import balance_backward, balance_sums  # imports Triton, which is optional

        return balance_sums, balance_backward
    return plain_sums, plain_gradient


def plain_sums(logits_ME: Tensor, top_k: int, mask_N: Tensor | None) -> Tensor:
    """The kernel's work by torch's own operations, on any device.

    Args:
        logits_ME: of some layers, one after another.
        top_k: experts a row.
        mask_N: what a layer's rows count; None where each counts one.

    Returns:
        How often each expert is chosen, and the sum of its probabilities, `(2, E)`.
    """
    p_ME = logits_ME.softmax(-1, dtype=torch.promote_types(logits_ME.dtype, torch.float32))
    weight_M = p_ME.new_ones(len(p_ME)) if mask_N is None else _weights(mask_N, p_ME)
    chosen_Mk = p_ME.topk(top_k, dim=-1).indices
    count_E = p_ME.new_zeros(p_ME.shape[1])
    count_E.scatter_add_(0, chosen_Mk.flatten(), weight_M.unsqueeze(1).expand_as(chosen_Mk).flatten())
    return torch.stack((count_E, p_ME.mul_(weight_M.unsqueeze(1)).sum(0)))


def plain_gradient(logits_ME: Tensor, dmean_E: Tensor, mask_N: Tensor | None) -> Tensor:
    """The kernel's work by torch's own operations, on any device.

    Args:
        logits_ME: of some layers, one after another.
        dmean_E: the gradient of the sum of each expert's probabilities.
        mask_N: what a layer's rows count; None where each counts one.
    """
    p_ME = logits_ME.softmax(-1, dtype=dmean_E.dtype)
    d_ME = p_ME * dmean_E
    d_ME.addcmul_(p_ME, d_ME.sum(-1, keepdim=True), value=-1)
    if mask_N is not None:
        d_ME *= _weights(mask_N, d_ME).unsqueeze(1)
    return d_ME.to(logits_ME.dtype)


def _groups(logits: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """As many layers at a time as probabilities may be there at once, at least one."""
    size = max(1, NUM_ELEMENTS // max(1, logits[0].numel()))
    for start in range(0, len(logits), size):
        yield list(logits[start : start + size])


def _weights(mask_N: Tensor, rows_ME: Tensor) -> Tensor:
    """Of each row of some layers, what it counts."""
    return mask_N.to(rows_ME.dtype).repeat(len(rows_ME) // max(1, len(mask_N)))
