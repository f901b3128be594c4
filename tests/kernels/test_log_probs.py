"""The kernel of log-probabilities against the same by torch's own operations."""

import pytest
import torch
from torch import Tensor

from expertune.loss.log_probs import Head, _kernel, _plain
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.numerics import assert_no_worse

pytestmark = needs_kernels
HEADS = {
    "plain": Head(torch.empty(0)),
    "capped, scaled, warm": Head(torch.empty(0), scale=0.5, softcap=3.0, inv_t=1.25),
}


def outs(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    log_prob, entropy = (torch.full((num_tokens,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    return log_prob, entropy, torch.empty(num_tokens, dtype=torch.bool, device=DEVICE)


def draw(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(num_tokens, vocabulary, generator=generator)
    label = torch.randint(vocabulary, (num_tokens,), generator=generator)
    label[: num_tokens // 2] = logits.argmax(-1)[: num_tokens // 2]  # as in a model that has learned something
    return logits.to(DEVICE, dtype), label.to(DEVICE)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (2, 4096), (4, 9001)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_it_is_no_worse_than_torch(dtype: torch.dtype, shape: tuple[int, int], head: Head) -> None:
    logits, label = draw(*shape, dtype)
    kernels, plain, exact = (outs(shape[0], d) for d in (torch.float32, torch.float32, torch.float64))
    ours, theirs, truth = logits.clone(), logits.clone(), logits.double()
    _kernel(ours, label, kernels, head, writes_gradient=True)
    _plain(theirs, label, plain, head, writes_gradient=True)
    _plain(truth, label, exact, head, writes_gradient=True)
    for name, mine, other, right in zip(("log_prob", "entropy"), kernels, plain, exact, strict=False):
        assert_no_worse(mine, other, right, name)
    assert_no_worse(ours, theirs, truth, "gradient")
    assert torch.equal(kernels[2], plain[2])


@pytest.mark.parametrize("label", [1, 3])
def test_of_equal_maxima_the_first_counts(label: int) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]], device=DEVICE, dtype=KERNEL_DTYPES[0])
    given = outs(1, torch.float32)
    _kernel(logits, torch.tensor([label], device=DEVICE), given, HEADS["plain"], writes_gradient=False)
    assert given[2].tolist() == [label == 1]


def test_without_a_gradient_logits_stay() -> None:
    logits, label = draw(3, 33, KERNEL_DTYPES[0])
    before = logits.clone()
    _kernel(logits, label, outs(3, torch.float32), HEADS["plain"], writes_gradient=False)
    assert torch.equal(logits, before)
    _kernel(logits[:0], label[:0], outs(0, torch.float32), HEADS["plain"], writes_gradient=True)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_label_beyond_the_vocabulary_has_no_probability(head: Head) -> None:
    """And what lies beside the logits is not read."""
    logits, _ = draw(4, 33, KERNEL_DTYPES[0])
    given = outs(4, torch.float32)
    _kernel(logits, torch.tensor([0, 33, -1, 32], device=DEVICE), given, head, writes_gradient=False)
    assert given[0].isnan().tolist() == [False, True, True, False]
    assert given[1].isfinite().all()
