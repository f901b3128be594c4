"""Sinks: one more score of each head, whose value is zero. It only takes its share of the softmax.

A kernel that knows none is told in forward's place what it would have found: its output times the share that keys keep,
and the log-sum-exp with the sink in it. From these two any backward yields the right gradients of queries, keys and
values, because it forms the probabilities from the one and their row sums from the other. (The idea is
FlashAttention-3's.)
"""

import torch
from torch import Tensor

from expertune.attention.kernels import Attended
from expertune.kernels import has_triton


def with_sinks(attended: Attended, sinks_H: Tensor | None) -> Attended:
    """What a kernel yields that knows none, written over what it has yielded.

    But not in a compiled model: what a node of autograd writes in place and saves, torch 2.11 saves as it was before.
    """
    if sinks_H is None:
        return attended
    out_BTHV, lse_BHT, state = attended
    whole_BHT = torch.logaddexp(lse_BHT, sinks_H.to(lse_BHT.dtype)[:, None])
    share_BTH1 = (lse_BHT - whole_BHT).exp().transpose(1, 2)[..., None]
    scaled_BTHV = out_BTHV * share_BTH1 if torch.compiler.is_compiling() else out_BTHV.mul_(share_BTH1)
    return Attended(scaled_BTHV, whole_BHT, state)


def gradient(dout_BTHV: Tensor, attended: Attended, sinks_H: Tensor) -> Tensor:
    """Of each head's sink, `-Σ p·⟨dout, out⟩` over its queries, where `p` is the share that it takes of a query.

    Args:
        dout_BTHV: the gradient of the output.
        attended: with sinks.
        sinks_H: the scores.
    """
    out_BTHV, lse_BHT, _ = attended
    share_BHT = (sinks_H.to(lse_BHT.dtype)[:, None] - lse_BHT).exp_()
    taken_BHT = share_BHT.mul_(_row_sums(dout_BTHV, out_BTHV, lse_BHT.dtype))
    return -taken_BHT.sum((0, 2)).to(sinks_H.dtype)


def _row_sums(dout_BTHV: Tensor, out_BTHV: Tensor, dtype: torch.dtype) -> Tensor:
    """`⟨dout, out⟩`, `(B, H, T)`."""
    if dout_BTHV.is_cuda and dtype == torch.float32 and has_triton() and not torch.compiler.is_compiling():
        from expertune.kernels.attention import row_sums  # imports Triton, which is optional

        return torch.stack([*map(row_sums, dout_BTHV.contiguous(), out_BTHV.contiguous())])
    sums_BTH: Tensor = torch.linalg.vecdot(dout_BTHV.to(dtype), out_BTHV.to(dtype))
    return sums_BTH.transpose(1, 2)
