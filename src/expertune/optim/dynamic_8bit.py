"""Dynamic 8-bit numbers, in blocks of 256 that share a maximum: the format in which bitsandbytes keeps Adam's moments.

A code stands for a fraction of its block's maximum: seven decades from 1e-7 to 1, each divided evenly into twice as
many steps as the decade below, and zero and one. So small values of a block keep their size, and large ones two digits
(Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

Rounding is to the nearest, as theirs, but for one thing: a second moment above zero is never rounded to zero. Where its
first moment lives on and the next gradient is zero, as for an expert that sees no token, the step would be that moment
divided by eps: thousands of times the learning rate.
"""

from functools import lru_cache

import torch
from torch import Tensor

from expertune.kernels.launch import ceil_div

BLOCK = 256  # numbers that share a maximum
DECADES = 7


@lru_cache
def values(*, is_signed: bool) -> Tensor:
    """What the 256 codes stand for, ascending, float32: from -0.99 to 1 if signed, else from 0."""
    positive: list[float] = []
    for decade in range(DECADES):
        steps = 2**decade if is_signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64, device="cpu")
        positive += (10.0 ** (decade - DECADES + 1) * (edges[:-1] + edges[1:]) / 2).tolist()
    negative = [-value for value in reversed(positive)] if is_signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0], device="cpu")


@lru_cache
def bounds(*, is_signed: bool) -> Tensor:
    """The 255 middles between neighbouring values: what lies between two of them is nearest to the value there."""
    ascending = values(is_signed=is_signed)
    return (ascending[:-1] + ascending[1:]) / 2


def encode(x: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 and of the shape of `x`, and each block's maximum, float32 `(blocks,)`.

    Rounds to the nearest; what is not signed, and not zero, to the nearest that is not zero.

    Args:
        x: float32, contiguous; blocks run over its numbers in order.
        is_signed: whether there are negative numbers.
    """
    padded = x.new_zeros((ceil_div(x.numel(), BLOCK), BLOCK))
    padded.view(-1)[: x.numel()] = x.reshape(-1)
    maximum = padded.abs().amax(dim=1)
    fraction = padded / maximum.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(fraction, bounds(is_signed=is_signed).to(x.device)).to(torch.uint8)
    if not is_signed:
        codes = torch.where(fraction > 0, codes.clamp_min(1), codes)
    return codes.view(-1)[: x.numel()].view(x.shape), maximum


def decode(codes: Tensor, maximum: Tensor, *, is_signed: bool) -> Tensor:
    """The numbers, float32, of the shape of `codes`.

    Args:
        codes: uint8, contiguous.
        maximum: of each block, float32 `(blocks,)`.
        is_signed: as they were encoded.
    """
    fraction = values(is_signed=is_signed).to(codes.device)[codes.long()]
    return fraction * maximum.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)


def zeros(like: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and maxima of zeros, one for each number of `like`, contiguous."""
    zero = int((values(is_signed=is_signed) == 0).nonzero())
    codes = torch.full((like.numel(),), zero, dtype=torch.uint8, device=like.device)
    return codes, torch.zeros(ceil_div(like.numel(), BLOCK), dtype=torch.float32, device=like.device)
