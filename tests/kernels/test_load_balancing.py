"""The kernels of the balance loss against the same by torch's own operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.loss.load_balancing import plain_gradient, plain_sums
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.numerics import assert_no_worse

pytest.importorskip("triton")
from expertune.kernels import load_balancing
from expertune.kernels.load_balancing import balance_backward, balance_sums

pytestmark = needs_kernels


CASES = [
    pytest.mark.parametrize("is_masked", [False, True]),
    pytest.mark.parametrize("shape", [(1, 1, 2), (3, 7, 5), (2, 40, 60), (2, 9, 512)], ids=str),
    pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str),
]


def cases(test: Any) -> Any:
    for case in CASES:
        test = case(test)
    return test


def draw_mask(num_tokens: int) -> Tensor:
    return (torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_tokens)) < 0.7).long().to(DEVICE)


@pytest.mark.parametrize("most_programs", [1, 3, 1024])
@cases
def test_sums_are_no_worse_than_torchs(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    is_masked: bool,
    most_programs: int,
) -> None:
    """Of logits of which no two in a row are equal."""
    monkeypatch.setattr(load_balancing, "_MOST_PROGRAMS", most_programs)
    num_layers, num_tokens, num_experts = shape
    generator = torch.Generator().manual_seed(num_experts)
    rows = [torch.randperm(num_experts, generator=generator) for _ in range(num_layers * num_tokens)]
    logits = (torch.stack(rows) / 64).to(DEVICE, dtype)
    mask = draw_mask(num_tokens) if is_masked else None
    top_k = max(1, num_experts // 8)
    ours, plain = balance_sums(logits, top_k, mask), plain_sums(logits, top_k, mask)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[0], plain[0])
    assert_no_worse(ours[1], plain[1], plain_sums(logits.double(), top_k, mask)[1], "probabilities")


def test_of_equal_logits_the_first_is_chosen_and_of_no_rows_none() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0]], device=DEVICE, dtype=KERNEL_DTYPES[0])
    assert balance_sums(logits, 1, None)[0].tolist() == [0, 1, 0, 0]
    assert balance_sums(logits, 3, None)[0].tolist() == [1, 1, 1, 0]
    assert not balance_sums(logits[:0], 1, None).any()


@cases
def test_the_gradient_is_no_worse_than_torchs(dtype: torch.dtype, shape: tuple[int, int, int], is_masked: bool) -> None:
    num_layers, num_tokens, num_experts = shape
    generator = torch.Generator().manual_seed(num_experts)
    logits = (3 * torch.randn(num_layers * num_tokens, num_experts, generator=generator)).to(DEVICE, dtype)
    dmean = torch.randn(num_experts, generator=generator).to(DEVICE)
    mask = draw_mask(num_tokens) if is_masked else None
    ours = balance_backward(logits, dmean, mask)
    assert ours.dtype == dtype
    plain, exact = plain_gradient(logits, dmean, mask), plain_gradient(logits.double(), dmean.double(), mask)
    assert_no_worse(ours, plain, exact, "gradient")


def test_as_many_are_chosen_where_few_have_a_logit() -> None:
    logits = torch.full((3, 8), -torch.inf, device=DEVICE)
    logits[:, 0] = 1.0
    count_E, _ = balance_sums(logits, 2, None)
    assert count_E.tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
