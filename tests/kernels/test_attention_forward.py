"""Attention's forward over spans against the formula written out: in the interpreter, and on Hopper in Gluon."""

import pytest
import torch
from torch import Tensor

from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.kernels.attention_cases import LATENT, WHOLE, Case, Width, formula, inputs, needs_hopper
from tests.numerics import assert_no_worse

pytestmark = needs_kernels


def ours(tensors: list[Tensor], scale: float, case: Case, sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from expertune.attention.forward import forward

    q, k, v, _ = tensors
    return forward(q, k, v, scale, case.spans(q.shape[2]), sinks_H)


def check(tensors: list[Tensor], scale: float, case: Case, sinks_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = ours(tensors, scale, case, sinks_H)
    q, k, v, _ = tensors
    plain = formula(q, k, v, scale, case, sinks_H)
    truth = formula(q.double(), k.double(), v.double(), scale, case, sinks_H)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert_no_worse(out.transpose(1, 2), plain[0], truth[0], "out")
    torch.testing.assert_close(lse, truth[1].float(), rtol=1e-5, atol=1e-5)
    return out, lse


def sinks(num_heads: int, dtype: torch.dtype) -> Tensor:
    """From some that take nothing to some that take all, in every other number of a tensor."""
    return torch.linspace(-30, 30, 2 * num_heads, dtype=dtype, device=DEVICE)[::2]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared", "width", "case"),
    [
        (2, 41, 4, 2, Width(24, 16), WHOLE),
        (1, 100, 5, 5, 16, Case(window=20)),
        (1, 100, 2, 1, 16, Case((1, 32, 2, 40, 25, 0, 0))),
        (1, 70, 1, 1, 8, Case((60, 10), window=33)),
    ],
    ids=["whole", "window, two heads of five at a time", "samples", "samples in a window"],
)
def test_it_is_no_worse_than_the_formula(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, case: Case, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from expertune.attention import forward

    monkeypatch.setattr(forward, "is_hopper", lambda _: False)  # the kernel in plain Triton, there too
    check(inputs(batch, length, num_heads, num_shared, width, dtype), 0.25, case)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", [WHOLE, Case((30, 15), window=20)], ids=["whole", "samples in a window"])
def test_a_sink_takes_its_share(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import forward

    monkeypatch.setattr(forward, "is_hopper", lambda _: False)
    check(inputs(1, 45, 6, 3, 16, dtype), 0.25, case, sinks(6, dtype))


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared", "case"),
    [
        (2, 1000, 4, 2, WHOLE),
        (1, 63, 3, 1, WHOLE),
        (1, 4200, 12, 12, WHOLE),
        (1, 1200, 8, 4, Case(window=100)),
        (1, 1201, 2, 2, Case(window=1000)),
        (1, 1200, 8, 4, Case((1, 500, 128, 127, 64, 130, 250, 0, 0))),
        (1, 1200, 8, 1, Case((700, 500), window=256)),
    ],
    ids=["whole", "a tile", "some heads after others", "short window", "long window", "samples", "samples in a window"],
)
@pytest.mark.parametrize("width", [64, 128, LATENT, 256], ids=str)
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
def test_on_hopper(
    has_sinks: bool, width: int | Width, batch: int, length: int, num_heads: int, num_shared: int, case: Case,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    given = (inputs(batch, length, num_heads, num_shared, width, dtype), 0.1, case)
    sinks_H = sinks(num_heads, dtype) if has_sinks else None
    first = check(*given, sinks_H)
    for _ in range(30):  # what a group or the copying warp took too early would be other numbers now and then
        assert all(torch.equal(x, y) for x, y in zip(ours(*given, sinks_H), first, strict=True))
