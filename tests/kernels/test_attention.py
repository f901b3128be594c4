"""Both kinds of attention's backward against the formula written out: in the interpreter, and on Hopper in Gluon."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.cases import DEVICE, KERNEL_DTYPES, later, needs_kernels
from tests.numerics import assert_no_worse

pytestmark = needs_kernels
NAMES = ("dq", "dk", "dv")


class Width(NamedTuple):
    """Of heads, and of their values."""

    keys: int
    values: int


LATENT = Width(192, 128)  # of DeepSeek


def inputs(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values, a gradient, `(B, heads, T, D or V)`; values lie behind others, as projections write."""
    draw = torch.Generator().manual_seed(0)
    D, V = width if isinstance(width, Width) else (width, width)
    shapes = [(num_heads, D), (num_shared, D), (num_shared, V + 16), (num_heads, V)]
    made = [torch.randn((batch, length, *shape), generator=draw).to(DEVICE, dtype) for shape in shapes]
    return [x[..., -wanted:].transpose(1, 2) for x, wanted in zip(made, (D, D, V, V), strict=True)]


class Case(NamedTuple):
    """Samples that lie one after the other, None for one, and the keys that a query attends to at most."""

    lengths: tuple[int, ...] | None = None
    window: int | None = None

    def hidden(self, length: int) -> Tensor:
        """Which scores do not count, `(T, T)`."""
        place = torch.arange(length)
        behind = place[:, None] - place[None, :]
        hidden = (behind < 0) | (behind >= (self.window or length))
        if self.lengths is not None:
            sample = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
            hidden |= sample[:, None] != sample[None, :]
        return hidden.to(DEVICE)

    def spans(self, length: int) -> Any:
        """The same as the kernels take it, with the longest sample rounded up as a step does."""
        from expertune.kernels.attention_spans import spans

        most = min(self.window or length, length if self.lengths is None else max(self.lengths) + 3)
        starts = None
        if self.lengths is not None:
            starts = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
        return spans(length, most, starts, DEVICE)


WHOLE = Case()


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, case: Case, sinks_H: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of the sum of each query's exponentials."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(case.hidden(q.shape[2]), -math.inf)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(q)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v, scores.logsumexp(-1)


def gradients(tensors: list[Tensor], scale: float, case: Case) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    return list(torch.autograd.grad(formula(q, k, v, scale, case)[0], (q, k, v), tensors[3]))


def ours(
    tensors: list[Tensor],
    scale: float,
    case: Case = WHOLE,
    *,
    forms_again: bool = False,
    **more: bool,
) -> list[Tensor]:
    from expertune.attention.backward import backward

    q, k, v, dout = tensors
    out, lse = formula(q.double(), k.double(), v.double(), scale, case)
    spans = case.spans(q.shape[2])
    given = (dout.transpose(1, 2), q, k, v, out.to(q).transpose(1, 2), lse.float(), scale, spans)
    return list(backward(*given, forms_again=forms_again, **more))


def check(tensors: list[Tensor], scale: float, case: Case = WHOLE, **how: bool) -> list[Tensor]:
    mine, plain = ours(tensors, scale, case, **how), gradients(tensors, scale, case)
    truth = gradients([x.double() for x in tensors], scale, case)
    for name, got, other, exact in zip(NAMES, mine, plain, truth, strict=True):
        assert got.dtype == tensors[0].dtype
        assert got.shape == exact.shape
        assert_no_worse(got, other, exact, name)
    return mine


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """On the bytes of the gradient of scores."""
    from expertune.attention import backward

    monkeypatch.setattr(backward, "_LEAST", request.param)
    monkeypatch.setattr(backward, "_A_TOKEN", 0)


BOUNDS = {"whole": 2**30, "some heads or queries": 31_000, "one block": 1}


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


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of samples that were cut in halves, of which none is too short."""
    from expertune.attention import backward, backward_halves

    lengths: list[int] = []
    sample = backward_halves.sample

    def counted(kernels: Any, given: Any, *others: Any) -> None:
        lengths.append(len(given.q_THD))
        sample(kernels, given, *others)

    monkeypatch.setattr(backward_halves, "sample", counted)
    monkeypatch.setattr(backward, "_FEWEST_WAVES", 0)
    return lengths


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared", "width"),
    [(1, 64, 2, 2, 16), (2, 128, 4, 2, Width(24, 16)), (1, 192, 3, 1, 16)],
    ids=str,
)
def test_by_halves_it_is_no_worse_than_the_formula(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype,
    halved: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    check(inputs(batch, length, num_heads, num_shared, width, dtype), 0.25, is_whole=True)
    assert halved == [length] * batch


@pytest.mark.parametrize("length", [96, 130], ids=["odd blocks", "no whole blocks"])
def test_what_has_no_halves_is_not_cut_so(length: int, halved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    check(inputs(1, length, 2, 2, 16, KERNEL_DTYPES[0]), 0.25, is_whole=True)
    assert halved == []


@pytest.mark.parametrize(
    ("length", "row", "fewest", "reason"),
    [
        (2**15, 5120, 1.9, None),
        (2**14, 5120, 1.9, "one head of it has too few blocks"),
        (2**15 + 128, 5120, 1.9, "its halves are no whole blocks"),
        (2**17, 2**15, 1.9, "its halves lie too far apart"),
    ],
)
def test_which_samples_are_cut_in_halves(length: int, row: int, fewest: float, reason: str | None) -> None:
    from expertune.attention.backward_halves import why_not
    from expertune.kernels.attention import Heads

    near, far = (torch.empty((length, n // 256, 256), device="meta") for n in (256, row))
    rows = torch.empty((1, length), device="meta")
    given = Heads(near, near, far[:, :1], near, rows, rows)
    assert why_not(given, keys=128, num_programs=132, fewest=fewest) == reason


def test_halves_are_held_in_half_the_memory() -> None:
    from expertune.attention.backward_halves import num_scores
    from expertune.kernels.attention import scratch_shape

    rows, pitch = scratch_shape(1, 2**15, 2**15, 128, 0)
    assert num_scores(2**15, 128) < 0.503 * rows * pitch


@pytest.mark.parametrize("is_whole", [False, True], ids=["by heads", "by halves"])
@pytest.mark.parametrize("num_shared", [4, 2, 1])
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=list(BOUNDS), indirect=True)
@pytest.mark.usefixtures("bound", "halved")
def test_gradients_may_be_written_over_what_attended(
    num_shared: int, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    tensors = inputs(2, 128, 4, num_shared, 16, KERNEL_DTYPES[0])
    expected = ours(tensors, 0.25, is_whole=is_whole)
    found = ours(tensors, 0.25, is_whole=is_whole, overwrites=True)
    assert all(map(torch.equal, found, expected))
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in tensors[:3]]


@pytest.mark.parametrize("width", [16, Width(24, 16)], ids=str)
@pytest.mark.parametrize("is_whole", [False, True], ids=["by heads", "by halves"])
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=list(BOUNDS), indirect=True)
@pytest.mark.usefixtures("bound", "halved")
def test_that_of_queries_may_be_written_over_the_gradient_that_comes_in(
    is_whole: bool, width: int | Width, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertune.attention import backward

    monkeypatch.setattr(backward, "is_hopper", lambda _: False)
    tensors = inputs(1, 128, 4, 2, width, KERNEL_DTYPES[0])
    tensors[3] = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    before = [x.clone() for x in tensors[:3]]
    expected = ours(tensors, 0.25, is_whole=is_whole)
    found = ours(tensors, 0.25, is_whole=is_whole, overwrites_gradient=True)
    assert all(map(torch.equal, (*found, *tensors), (*expected, *before)))
    assert (found[0].data_ptr() == tensors[3].data_ptr()) == (width == 16)


def test_scores_that_are_formed_again_are_formed_of_what_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward_again

    monkeypatch.setattr(backward_again, "is_hopper", lambda _: False)
    tensors = inputs(1, 50, 4, 2, 16, KERNEL_DTYPES[0])
    before = [x.clone() for x in tensors]
    expected, found = (ours(tensors, 0.25, forms_again=True, overwrites=each) for each in (False, True))
    assert all(map(torch.equal, (*found, *tensors), (*expected, *before)))


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


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def check_on_hopper(tensors: list[Tensor], case: Case = WHOLE, *, is_whole: bool = False) -> None:
    """The kernels for heads of that width; two runs give the same bits, the second where the tensors were."""
    width = tensors[0].shape[-1]
    forms_again = width < 192
    first = check(tensors, width**-0.5, case, forms_again=forms_again, is_whole=is_whole)
    again = ours(tensors, width**-0.5, case, forms_again=forms_again, is_whole=is_whole, overwrites=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


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
@pytest.mark.parametrize("width", [256, LATENT], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "num_shared"), [(1, 256, 2, 2), (2, 1536, 4, 2), (1, 2048, 3, 1)], ids=str
)
def test_on_hopper_by_halves(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype, halved: list[int]
) -> None:
    check_on_hopper(inputs(batch, length, num_heads, num_shared, width, dtype), is_whole=True)
    assert halved == [length] * 2 * batch


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
