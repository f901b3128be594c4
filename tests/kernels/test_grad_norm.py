"""The norm of many gradients and the factor that clips them, against torch in float64."""

import math

import pytest
import torch
from torch import Tensor

from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels

pytest.importorskip("triton")
from expertune.kernels import grad_norm
from expertune.kernels.grad_norm import norm_and_clip_coef

pytestmark = needs_kernels
NUMELS = (1, 16, 300, 8192, 2 * 8192 + 5)


def gradients(numels: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Of other magnitudes each."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(numel, generator=generator) * 10.0**-i for i, numel in enumerate(numels)]
    return [grad.to(DEVICE, dtype) for grad in drawn]


def expected(grads: list[Tensor], max_norm: float) -> tuple[float, float]:
    norm = float(torch.cat([grad.double().flatten() for grad in grads]).norm())
    return norm, min(max_norm / (norm + 1e-6), 1.0)


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_as_in_float64(dtype: torch.dtype, max_norm: float) -> None:
    grads = gradients(NUMELS, dtype)
    ours = norm_and_clip_coef(grads, max_norm)
    assert [tuple(x.shape) for x in ours] == [(), ()]
    assert [x.dtype for x in ours] == [torch.float32] * 2
    assert [float(x) for x in ours] == pytest.approx(expected(grads, max_norm), rel=1e-6)
    assert all(map(torch.equal, ours, norm_and_clip_coef(grads, max_norm)))


def test_of_several_dtypes_and_shapes_and_off_addresses() -> None:
    flat = torch.randn(100, device=DEVICE)
    grads = [flat[1:], torch.randn(3, 5, device=DEVICE).half(), torch.randn(7, 9, device=DEVICE), flat[:0]]
    assert [float(x) for x in norm_and_clip_coef(grads, 2.0)] == pytest.approx(expected(grads, 2.0), rel=1e-6)


def test_of_more_tiles_than_are_added_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_norm, "_TILE", 16)
    monkeypatch.setattr(grad_norm, "_TILES", 8)
    grads = gradients((16 * 8 + 40, 8), torch.float32)
    assert [float(x) for x in norm_and_clip_coef(grads, 2.0)] == pytest.approx(expected(grads, 2.0), rel=1e-6)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_what_is_not_finite_is_told(number: float) -> None:
    grads = gradients((300, 5), torch.float32)
    grads[0][7] = number
    norm, coef = norm_and_clip_coef(grads, 1.0)
    assert not math.isfinite(norm)
    assert float(coef) == 0 if math.isinf(number) else math.isnan(coef)
