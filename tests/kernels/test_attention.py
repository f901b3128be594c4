"""Both kinds of attention's backward against the formula written out: in the interpreter, and on Hopper in Gluon."""

import pytest
import torch

from tests.cases import DEVICE, KERNEL_DTYPES, later, needs_kernels
from tests.kernels.attention_cases import (
    BOUNDS,
    LATENT,
    WHOLE,
    Case,
    Width,
    check,
    check_on_hopper,
    formula,
    inputs,
    needs_hopper,
    ours,
)

pytestmark = needs_kernels


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [  # how a sample is cut changes no rounding: in the interpreter first in one dtype
        pytest.param(dtype, bound, id=f"{name}-{dtype}", marks=later(dtype != KERNEL_DTYPES[0] and name != "whole"))
        for dtype in KERNEL_DTYPES
        for name, bound in BOUNDS.items()
    ],
    indirect=["bound"],
)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared", "width"),
    [(1, 70, 2, 2, 16), (2, 41, 4, 2, Width(24, 16)), (1, 130, 1, 1, 16), (1, 7, 1, 1, Width(16, 8))],
    ids=str,
)
@pytest.mark.usefixtures("bound")
def test_it_is_no_worse_than_the_formula(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)  # the kernels in plain Triton, there too
    check(inputs(batch, length, num_heads, num_shared, width, dtype), 0.25)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (Case(window=20), 2**30),
        (Case(window=90), 2**30),
        (Case((1, 62, 2, 40, 25, 0, 0)), 2**30),
        (Case((100, 30), window=33), 31_000),
        (Case((9, 121)), 15_000),
    ],
    ids=["short window", "long window", "short samples", "samples in a window, head by head", "queries in parts"],
    indirect=["bound"],
)
@pytest.mark.usefixtures("bound")
def test_no_query_reaches_beyond_its_window_and_sample(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    check(inputs(1, 130, 2, 1, 16, dtype), 0.25, case)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "bound", "summed"),
    [(WHOLE, 2**30, 4), (Case(window=20), 2**30, 4), (Case((90, 40)), 80_000, 2)],
    ids=["folded", "a band", "in two parts"],
    indirect=["bound"],
)
@pytest.mark.usefixtures("bound")
def test_heads_that_share_keys_are_summed_by_one_program(
    case: Case, summed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    monkeypatch.setattr(backward, "num_programs", lambda _: 1)
    monkeypatch.setattr(backward, "_WAVES", 20)  # so many heads at a time as there is room for
    monkeypatch.setattr(backward, "_FEWEST_WAVES", 20)
    monkeypatch.setattr(backward, "_WAVES_OF_SUMS", 0)
    monkeypatch.setattr(backward, "_WAVES_OF_SUMS_IN_A_BAND", 0)
    band = case.spans(130).band(32)
    cut = backward.cut_into(130, 4, 4, 32, 1, band)
    assert (cut.summed, cut.band > 0) == (summed, case.window is not None)
    check(inputs(1, 130, 4, 1, 16, dtype), 0.25, case)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("fewest", [0, 4, 100], ids=["all heads", "some heads", "none"])
@pytest.mark.parametrize(
    "case", [WHOLE, Case(window=20), Case((1, 32, 2, 15, 0, 0))], ids=["whole", "window", "samples"]
)
def test_scores_formed_again(case: Case, fewest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward_again

    monkeypatch.setattr(backward_again, "is_hopper", lambda _: False)
    monkeypatch.setattr(backward_again, "_WAVES", fewest)
    monkeypatch.setattr(backward_again, "num_programs", lambda _: 1)
    check(inputs(2, 50, 4, 1, 24, dtype), 0.2, case, forms_again=True)


@pytest.mark.parametrize(
    ("group", "num_blocks", "fewest", "heads"),
    [(1, 5, 9, 1), (8, 512, 198, 2), (8, 1024, 198, 4), (12, 12288, 198, 12)],
)
def test_as_many_heads_are_summed_as_leave_enough_programs(
    group: int, num_blocks: int, fewest: float, heads: int
) -> None:
    from expertune.attention.backward_again import heads_summed

    assert heads_summed(group, num_blocks, fewest) == heads


@pytest.mark.parametrize(
    ("num_blocks", "num_heads", "num_shared", "together"),
    [(32, 20, 20, 7), (128, 20, 20, 2), (8, 20, 20, 20), (128, 32, 4, 16), (64, 64, 64, 4), (500, 3, 3, 2)],
)
def test_a_few_heads_come_first(
    num_blocks: int, num_heads: int, num_shared: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.kernels import attention_order

    monkeypatch.setattr(attention_order, "num_programs", lambda _: 132)
    found = attention_order.heads_together(num_blocks, num_heads, num_shared, torch.device("cpu"))
    assert found == together


def test_any_strides_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward as module

    monkeypatch.setattr(module, "is_hopper", lambda _: False)
    backward = module.backward
    q, k, v, dout = inputs(1, 40, 2, 2, 16, KERNEL_DTYPES[0])
    (out, lse), spans = formula(q, k, v, 0.25, WHOLE), WHOLE.spans(40)
    expected = backward(dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse.float(), 0.25, spans)
    others = [x.mT.contiguous().mT for x in (q, k, v)]
    odd = torch.zeros(dout.numel() + 1, dtype=dout.dtype, device=DEVICE)[1:].view(1, 40, 2, 16)
    odd.copy_(dout.transpose(1, 2))
    found = backward(odd, *others, out.transpose(1, 2), lse.float(), 0.25, spans)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("length", "num_heads", "group", "most", "cut"),
    [
        (4096, 20, 1, 4096, (20, 4096, 0, 1)),
        (8192, 20, 1, 8192, (4, 8192, 0, 1)),
        (32768, 20, 1, 32768, (1, 32768, 0, 1)),
        (100_000, 20, 1, 100_000, (1, 20224, 0, 1)),
        (4096, 16, 8, 4096, (16, 4096, 0, 1)),
        (16384, 16, 8, 16384, (2, 16384, 0, 1)),
        (20_000, 24, 3, 20_000, (1, 20096, 0, 1)),
        (5000, 24, 3, 5000, (12, 5120, 0, 1)),
        (16384, 20, 1, 4096, (4, 16384, 4224, 1)),
        (16384, 16, 2, 1024, (16, 16384, 1152, 2)),
        (16384, 16, 2, 2700, (6, 16384, 2944, 2)),
        (16384, 16, 8, 3000, (4, 16384, 3200, 1)),
        (100_000, 16, 2, 1024, (4, 100_096, 1152, 2)),
        (100_000, 20, 1, 16384, (1, 100_096, 16512, 1)),
    ],
)
def test_what_is_held_is_bounded(
    length: int, num_heads: int, group: int, most: int, cut: tuple[int, int, int, int]
) -> None:
    from expertune.attention.backward import cut_into
    from expertune.kernels.attention import scratch_shape
    from expertune.kernels.attention_spans import Spans

    columns = Spans(most, *torch.empty(2, 0)).band(128)
    assert cut_into(length, num_heads, group, keys=128, num_programs=132, band=columns) == cut
    heads, queries, band, _ = cut
    rows, pitch = scratch_shape(heads, length, queries, 128, band)
    assert 2 * rows * pitch <= max(2**29, 40 * 2**10 * length)


def test_heads_that_lie_too_far_apart_are_laid_together() -> None:
    from expertune.kernels.attention_hopper import readable

    heads_first = torch.empty((1, 65, 2**17, 256), dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert readable(heads_first).stride(2) == 256
    assert readable(heads_first[:, :, :60]).stride(2) == 2**17 * 256


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("width", "bound"),
    [(64, 2**30), (128, 2**30)] + [(width, bound) for width in (256, LATENT) for bound in (2**30, 2_000_000, 1)],
    ids=["64", "128"]
    + [f"{width}, {cut}" for width in ("256", "latent") for cut in ("whole", "some heads or queries", "one block")],
    indirect=["bound"],
)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared"),
    [(1, 128, 2, 2), (1, 1000, 4, 4), (2, 1500, 8, 2), (1, 63, 3, 1), (1, 2049, 2, 2), (1, 700, 8, 1)],
    ids=str,
)
@pytest.mark.usefixtures("bound")
def test_on_hopper(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype
) -> None:
    check_on_hopper(inputs(batch, length, num_heads, num_shared, width, dtype))


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("width", "bound"), [(64, 2**30), (128, 2**30), (256, 2**30), (256, 1), (LATENT, 2**30), (LATENT, 1)],
    ids=["64", "128", "256, whole", "256, one block", "latent, whole", "latent, one block"],
    indirect=["bound"],
)  # fmt: skip
@pytest.mark.parametrize(
    "case",
    [
        Case(window=100),
        Case(window=1000),
        Case((1, 500, 128, 127, 64, 130, 250, 0, 0)),
        Case((900, 300)),
        Case((700, 500), window=256),
    ],
    ids=["short window", "long window", "short samples", "long samples", "samples in a window"],
)
@pytest.mark.usefixtures("bound")
def test_on_hopper_no_query_reaches_beyond_its_window_and_sample(
    case: Case, width: int | Width, dtype: torch.dtype
) -> None:
    check_on_hopper(inputs(1, 1200, 8, 4, width, dtype), case)


@needs_hopper
@pytest.mark.parametrize("width", [64, 128, LATENT, 256], ids=str)
@pytest.mark.parametrize("num_shared", [1, 2, 8])
@pytest.mark.parametrize("waves", [0, 0.1], ids=["all heads of a group", "some"])
def test_on_hopper_heads_that_share_keys_are_summed_by_one_program(
    waves: float, num_shared: int, width: int | Width, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.attention import backward, backward_again

    monkeypatch.setattr(backward, "_WAVES_OF_SUMS", waves)
    monkeypatch.setattr(backward, "_WAVES_OF_SUMS_IN_A_BAND", waves)
    monkeypatch.setattr(backward_again, "_WAVES", waves)
    check_on_hopper(inputs(1, 1200, 8, num_shared, width, torch.bfloat16), Case((1, 500, 128, 127, 64, 380)))


@needs_hopper
@pytest.mark.parametrize("width", [64, 128, LATENT, 256], ids=str)
def test_on_hopper_nothing_depends_on_when_who_comes(width: int | Width) -> None:
    """What a group or the copying warp took too early would be other numbers now and then."""
    tensors = inputs(1, 2100, 8, 4, width, torch.bfloat16)
    how = {"scale": 0.1, "forms_again": width in (64, 128)}
    first = ours(tensors, **how)
    for _ in range(200):
        found = ours(tensors, **how)
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))
