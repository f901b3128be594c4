"""Attention's backward by halves of a sample, and gradients that are written over what is no longer read."""

import pytest
import torch

from tests.cases import KERNEL_DTYPES, needs_kernels
from tests.kernels.attention_cases import (
    BOUNDS,
    LATENT,
    Width,
    check,
    check_on_hopper,
    inputs,
    needs_hopper,
    ours,
)

pytestmark = needs_kernels


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
