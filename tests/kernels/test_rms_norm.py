"""The kernels of norms with a frozen weight, against torch's own operations, forward and backward."""

import pytest
import torch
from torch import Tensor

from expertune.rms_norm import _FrozenNorm
from tests.cases import KERNEL_DTYPES, draw, needs_kernels
from tests.numerics import assert_no_worse

pytestmark = needs_kernels


def plain(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """As hosts write it: in float32, or in float64 if that is the input's."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (weight.to(wide.dtype) + offset)).to(x.dtype)


def results(out: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, x, dy.to(out.dtype))]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 4, 128), (5, 100), (7, 2880)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_it_is_no_worse_than_torch(
    dtype: torch.dtype, shape: tuple[int, ...], weight_dtype: torch.dtype | None, offset: float
) -> None:
    x, dy = (draw(seed, *shape).to(dtype).requires_grad_() for seed in (0, 1))
    weight = draw(2, shape[-1]).to(weight_dtype or dtype)
    exact = x.detach().double().requires_grad_()
    ours = results(_FrozenNorm.apply(x, weight, 1e-2, offset), x, dy)
    theirs = results(plain(x, weight, 1e-2, offset), x, dy)
    truth = results(plain(exact, weight.double(), 1e-2, offset), exact, dy)
    for name, mine, other, right in zip(("y", "dx"), ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, other, right, name)


def test_rows_that_are_no_rows_or_lie_apart() -> None:
    x = draw(0, 4, 6, 8).transpose(0, 1).to(KERNEL_DTYPES[0])
    weight = draw(1, 8).to(KERNEL_DTYPES[0])
    torch.testing.assert_close(_FrozenNorm.apply(x, weight, 1e-6, 0.0), plain(x, weight, 1e-6, 0.0))
    assert _FrozenNorm.apply(x[:0], weight, 1e-6, 0.0).shape == (0, 4, 8)
