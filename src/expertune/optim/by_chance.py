"""Rounding to bfloat16 up or down by chance, so that what is rounded is right on average.

bfloat16 has 8 significant bits, and an optimizer's update is often less than half of the last: rounded to the nearest,
the parameter never moves. Rounded up as often as the update is a part of that last bit, many small updates count as
they should. (Zamirai et al. 2020, "Revisiting BFloat16 Training".) The chance is a hash of where a number lies and of
the step, so two runs are the same.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0x9E3779B9, 0x7FEB352D, 0x846CA68B)  # of the step, then of the hash "lowbias32" (Chris Wellons, 2018)
_MASK = 0xFFFFFFFF


def chances(numel: int, step: int, device: torch.device) -> Tensor:
    """A number in 0 … 65,535 for each place, `(numel,)` int64.

    Args:
        numel: places.
        step: of the optimizer.
        device: of the result.
    """
    of_step, first, second = MULTIPLIERS
    x = torch.arange(numel, device=device) & _MASK ^ (step * of_step & _MASK)
    x = (x ^ x >> 16) * first & _MASK
    x = (x ^ x >> 15) * second & _MASK
    return (x ^ x >> 16) >> 16


def to_bfloat16(x_N: Tensor, step: int) -> Tensor:
    """Numbers in bfloat16, each one of the two nearest to `x`, by chance; what is not finite stays as it is.

    Args:
        x_N: float32, contiguous.
        step: of the optimizer.
    """
    bits = x_N.view(torch.int32) + chances(x_N.numel(), step, x_N.device).int()
    return torch.where(x_N.isfinite(), (bits & ~0xFFFF).view(torch.float32), x_N).bfloat16()
