"""The kernel against the same step in plain torch."""

import pytest
import torch
from torch import Tensor

from expertune.optim import by_chance, dynamic_8bit
from expertune.optim.fused_step import plain_step, tables
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
from expertune.kernels.adamw_8bit import Stepped, _to_bfloat16, adamw_8bit  # noqa: E402 imports Triton

pytestmark = needs_kernels
SIZES = (1, 256, 300, 2048, 5000)
UPDATE = (0.999, 0.9, 0.98, 1e-2, 1.5, 1e-8, 7)
ONE, CLIPPED = torch.tensor(1.0, device=DEVICE), torch.tensor(0.3, device=DEVICE)


def draw(numel: int, seed: int) -> Tensor:
    """Of all magnitudes, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * 10 ** (6 * torch.rand(numel, generator=generator) - 6)
    return (x * (torch.rand(numel, generator=generator) > 0.1)).to(DEVICE)


def row(numel: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    mean, mean_maximum = dynamic_8bit.encode(draw(numel, seed), is_signed=True)
    square, square_maximum = dynamic_8bit.encode(draw(numel, seed + 1).square(), is_signed=False)
    param, grad = draw(numel, seed + 2).to(dtype), draw(numel, seed + 3).to(dtype)
    return [param, grad, mean, square, mean_maximum, square_maximum]


def step(rows: list[list[Tensor]], update: tuple[float, ...], clip_coef: Tensor = ONE) -> None:
    params, grads, *moments = zip(*rows, strict=True)
    adamw_8bit(Stepped(params, [*zip(*moments, strict=True)]), grads, clip_coef, tables(DEVICE), update)


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_all_parameters_step_as_each_in_torch(dtype: torch.dtype, is_aligned: bool) -> None:
    rows = [row(numel, seed, dtype) for seed, numel in enumerate(SIZES)]
    if not is_aligned:
        rows[2][1] = torch.cat((rows[2][1][:1], rows[2][1]))[1:]
    expected = [[t.clone() for t in each] for each in rows]
    for param, grad, *moments in expected:
        plain_step(param, grad, CLIPPED, moments, UPDATE)
    step(rows, UPDATE, CLIPPED)
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
        for codes, maximum, is_signed in ((2, 4, True), (3, 5, False)):
            torch.testing.assert_close(ours[maximum], theirs[maximum], rtol=1e-6, atol=0)
            is_off = ours[codes] != theirs[codes]
            assert is_off.float().mean() <= 0.01  # what lies in the middle of two values may fall to either side
            assert ((ours[codes].int() - theirs[codes].int()).abs() <= 1).all()
            values = [dynamic_8bit.decode(each[codes], each[maximum], is_signed=is_signed) for each in (ours, theirs)]
            torch.testing.assert_close(*values, rtol=0.4, atol=1e-6)


@triton.jit(do_not_specialize=["count"])
def _rounding_kernel(x_ptr, out_ptr, count, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, _to_bfloat16(tl.load(x_ptr + at), at.to(tl.int64), count))


@pytest.mark.parametrize("step", [1, 2, 2**31 - 1])
def test_the_chance_is_that_of_plain_torch(step: int) -> None:
    """In float32, because the interpreter computes bfloat16 wrongly."""
    x = draw(2048, seed=0)
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    out = torch.empty_like(x)
    _rounding_kernel[(1,)](x, out, step, x.numel())
    torch.testing.assert_close(out, by_chance.to_bfloat16(x, step).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("is_signed", [True, False])
def test_every_code_is_reached_and_the_nearest(is_signed: bool) -> None:
    bounds = dynamic_8bit.bounds(is_signed=is_signed)
    tiny = torch.tensor([1.6e-7, 1e-7, 5e-8, 1e-12])
    x = torch.cat((dynamic_8bit.values(is_signed=is_signed), bounds * (1 - 1e-5), bounds * (1 + 1e-5), tiny))
    blocks = torch.ones(4, 256)  # each begins with its maximum, one
    blocks[:, 1:].copy_(torch.cat((x, torch.zeros(4 * 255 - len(x)))).view(4, 255))
    wanted = blocks.flatten().to(DEVICE)
    grad = wanted if is_signed else wanted.sqrt()
    mean, mean_maximum = dynamic_8bit.zeros(grad, is_signed=True)
    square, square_maximum = dynamic_8bit.zeros(grad, is_signed=False)
    becomes = (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1)  # the moments become the gradient and its square
    row = [torch.zeros_like(grad), grad, mean, square, mean_maximum, square_maximum]
    step([row], becomes)
    codes = (mean if is_signed else square).view(4, 256)[:, 1:].flatten()[: len(x)].cpu().int()
    nearest = torch.bucketize(x, bounds).int()
    assert torch.equal(codes, nearest if is_signed else torch.where(x > 0, nearest.clamp_min(1), 0))
    assert len(set(codes.tolist())) == 256


def test_the_greatest_of_a_block_keeps_its_sign() -> None:
    """Of -1 there is no code, and where product and sum are fused, its place rounds to that beyond the last."""
    grad = -draw(256 * (4096 if DEVICE.type == "cuda" else 256), seed=5).abs()
    moments = [t for is_signed in (True, False) for t in dynamic_8bit.zeros(grad, is_signed=is_signed)]
    mean, mean_maximum, square, square_maximum = moments
    row = [torch.zeros_like(grad), grad, mean, square, mean_maximum, square_maximum]
    step([row], (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1))
    greatest = grad.view(-1, 256).abs().argmax(1, keepdim=True)
    assert (mean.view(-1, 256).gather(1, greatest) == 0).all()
    assert (square.view(-1, 256).gather(1, greatest) == 255).all()
    assert (mean <= 127).all()
