"""The kernel that adds what LoRA adds to a dense linear, against torch's own product."""

import pytest
import torch

from expertune import split_linear
from expertune.kernels import low_rank
from expertune.kernels.low_rank import MOST_RANKS, add_product
from expertune.lora_linears import lora_linears
from expertune.shapes import LoraFactors
from expertune.split_linear import Linear
from tests.cases import KERNEL_DTYPES, draw, needs_cuda, needs_kernels
from tests.hosts.spies import inputs_of
from tests.numerics import assert_no_worse

pytestmark = needs_kernels


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 260, 4), (33, 127, 33), (130, 64, MOST_RANKS)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_it_is_no_worse_than_torch(dtype: torch.dtype, shape: tuple[int, int, int], is_transposed: bool) -> None:
    rows, columns, rank = shape
    y = draw(0, rows, 2 * columns).to(dtype)[:, columns:]
    before, left = y.clone(), draw(1, rows, rank).to(dtype)
    right = draw(2, columns, rank).to(dtype).mT if is_transposed else draw(2, rank, columns).to(dtype)
    theirs = before.clone().addmm_(left, right, alpha=1.5)
    add_product(y, left, right, 1.5)
    assert_no_worse(y, theirs, before.double() + 1.5 * left.double() @ right.double())


def test_no_rows() -> None:
    dtype = KERNEL_DTYPES[0]
    add_product(draw(0, 0, 8).to(dtype), draw(1, 0, 4).to(dtype), draw(2, 4, 8).to(dtype), 1.0)


@needs_cuda
def test_it_runs_where_a_matrix_is_too_large_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = inputs_of(monkeypatch, low_rank, "add_product")
    dtype, rank = KERNEL_DTYPES[-1], 16
    x, weight = draw(0, 512, 64).to(dtype).requires_grad_(), draw(1, 96, 64).to(dtype)
    a, b = draw(2, rank, 64).requires_grad_(), draw(3, 96, rank).requires_grad_()
    results = []
    for cache in (0, 2**30):
        monkeypatch.setattr(split_linear, "cache_bytes", lambda _, cache=cache: cache)
        y = lora_linears(x, [Linear(weight, None, LoraFactors(a=a, b=b, scale=2.0))])[0]
        results.append([y.detach(), *torch.autograd.grad(y, [x, a, b], torch.ones_like(y))])
    assert len(calls) == 2, "there and back, and only where there is no cache"
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())
