"""The kernel of the balance loss's gradient against the same by torch's own operations."""

import pytest
import torch

from expertune.backends import triton
from expertune.loss.load_balancing import plain_gradient
from tests.cases import DEVICE, problem
from tests.numerics import assert_no_worse

pytest.importorskip("triton")
from expertune.kernels.load_balancing import balance_backward

DTYPES = [d for d in (torch.float32, torch.float16, torch.bfloat16) if triton.BACKEND.why_not(problem(d, 16)) is None]
pytestmark = pytest.mark.skipif(not DTYPES, reason="needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 7, 5), (2, 40, 60), (2, 9, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_no_worse_than_torch(dtype: torch.dtype, shape: tuple[int, int, int], is_masked: bool) -> None:
    num_layers, num_tokens, num_experts = shape
    generator = torch.Generator().manual_seed(num_experts)
    logits = (3 * torch.randn(num_layers * num_tokens, num_experts, generator=generator)).to(DEVICE, dtype)
    dmean = torch.randn(num_experts, generator=generator).to(DEVICE)
    mask = (torch.rand(num_tokens, generator=generator) < 0.7).long().to(DEVICE) if is_masked else None
    ours = balance_backward(logits, dmean, mask)
    assert ours.dtype == dtype
    plain, exact = plain_gradient(logits, dmean, mask), plain_gradient(logits.double(), dmean.double(), mask)
    assert_no_worse(ours, plain, exact, "gradient")
