"""The codes are the nearest, and stand for what bitsandbytes' stand for."""

import pytest
import torch
from torch import Tensor

from expertune.optim import dynamic_8bit

SIGNED = pytest.mark.parametrize("is_signed", [True, False])


def nearest(fraction: Tensor, *, is_signed: bool) -> Tensor:
    """How far the nearest value is, of those above zero if nothing is negative."""
    values = dynamic_8bit.values(is_signed=is_signed).double()[0 if is_signed else 1 :]
    return (fraction.double()[:, None] - values).abs().amin(dim=1)


@SIGNED
def test_there_are_256_values_ascending_with_zero_and_one(is_signed: bool) -> None:
    values = dynamic_8bit.values(is_signed=is_signed)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert 0.0 in values
    assert values[-1] == 1.0


def test_values_as_published() -> None:
    """Seven decades: 1, 2, 4, … steps in each if signed, 2, 4, 8, … if not; a step's value is its middle."""
    signed, unsigned = dynamic_8bit.values(is_signed=True), dynamic_8bit.values(is_signed=False)
    assert signed[128:131].tolist() == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6])
    assert signed[254].item() == pytest.approx(1 - 0.45 / 64)
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert unsigned[1:4].tolist() == pytest.approx([3.25e-7, 7.75e-7, 2.125e-6])
    assert unsigned[254].item() == pytest.approx(1 - 0.45 / 128)


@SIGNED
def test_a_code_is_the_nearest_of_its_block(is_signed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=draw) * 10 ** (4 * torch.rand(1000, generator=draw) - 6)
    x = x if is_signed else x.abs()
    codes, maximum = dynamic_8bit.encode(x, is_signed=is_signed)
    assert codes.dtype == torch.uint8
    assert torch.equal(maximum, torch.stack([block.abs().max() for block in x.split(256)]))
    fraction = torch.cat([block / block.abs().max() for block in x.split(256)])
    decoded = dynamic_8bit.decode(codes, torch.ones(4), is_signed=is_signed)
    error = (decoded.double() - fraction.double()).abs()
    torch.testing.assert_close(error, nearest(fraction, is_signed=is_signed), rtol=0, atol=1e-7)


@SIGNED
def test_zeros_stay_zeros(is_signed: bool) -> None:
    codes, maximum = dynamic_8bit.zeros(torch.ones(300), is_signed=is_signed)
    again, same = dynamic_8bit.encode(torch.zeros(300), is_signed=is_signed)
    assert torch.equal(codes, again)
    assert torch.equal(maximum, same)
    assert not dynamic_8bit.decode(codes, maximum, is_signed=is_signed).any()
