"""Rounding by chance: to one of the two nearest, right on average, the same every time."""

import pytest
import torch
from torch import nn

from expertune import AdamW8bit
from expertune.optim.by_chance import chances, to_bfloat16

CPU = torch.device("cpu")


def test_chances_are_even_and_new_in_each_step() -> None:
    """Each of the 16 bits is set half of the time, and steps have nothing in common."""
    first, second = (chances(2**16, step, CPU) for step in (1, 2))
    for bits in (first, second, first ^ second):
        assert bits.min() >= 0 and bits.max() < 2**16
        set_bits = (bits[:, None] >> torch.arange(16) & 1).double().mean(dim=0)
        assert (set_bits - 0.5).abs().max() < 0.01  # five standard deviations
    assert torch.equal(first, chances(2**16, 1, CPU))


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -7.7e20, 1e-40])
def test_it_is_one_of_the_two_nearest_and_right_on_average(value: float) -> None:
    x = torch.full((2**16,), value)
    rounded = to_bfloat16(x, 3)
    towards_zero = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    away = torch.nextafter(towards_zero, torch.full_like(towards_zero, value * torch.inf))
    assert ((rounded == towards_zero) | (rounded == away)).all()
    gap = (away[0].double() - towards_zero[0].double()).abs()
    assert (rounded.double().mean() - x[0].double()).abs() < 0.01 * gap


def test_what_is_exact_or_not_finite_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
    for step in range(20):
        rounded = to_bfloat16(x, step)
        assert torch.equal(rounded[:6], x[:6].bfloat16())
        assert rounded[6].isnan()
        assert rounded[7] > 3.38e38  # the greatest, or infinite


def test_small_updates_count() -> None:
    """Rounded to the nearest, updates of a thirty-second of the last bit would leave the parameter where it is."""
    param = nn.Parameter(torch.ones(2**15, dtype=torch.bfloat16))
    optimizer = AdamW8bit([param], lr=2.0**-12, betas=(0.0, 0.0), weight_decay=0.0)
    for _ in range(300):
        param.grad = torch.full_like(param, -1.0)
        optimizer.step()
    assert param.float().mean().item() == pytest.approx(1 + 300 * 2.0**-12, rel=1e-3)
