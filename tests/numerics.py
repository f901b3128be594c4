"""When a result counts as right: its error against float64 is no worse than plain torch's in the same dtype."""

import torch
from torch import Tensor

# Added to plain torch's own error, relative to the norm of the truth. The same terms summed in another order differ by
# a few roundings of the dtype they are summed in: eight units of the last place. In 16 bits sums run in float32 and
# only the result is rounded: one unit.
SLACK = {
    torch.float64: 8 * 2.0**-52,
    torch.float32: 8 * 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def error(result: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to the norm of the truth."""
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    assert result.isfinite().all(), "not finite"
    scale = truth.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
    return ((result.double() - truth.double()).norm() / scale).item()


def assert_no_worse(result: Tensor, plain: Tensor, truth: Tensor, name: str = "result", depth: int = 1) -> None:
    """`result` against the float64 `truth` is at most as far off as `plain`, plus the dtype's slack of each layer.

    The error of a tensor of two numbers is a sample of two, and another sample of the same error differs from it by
    about `1/√n`: plain torch's counts with that much more. From a thousand numbers on that is nothing.
    """
    slack = depth * SLACK[result.dtype]
    ours, theirs = error(result, truth), error(plain, truth) * (1 + max(truth.numel(), 1) ** -0.5)
    assert ours <= theirs + slack, f"{name}: error {ours:.3g}, plain torch {theirs:.3g} + slack {slack:.3g}"
