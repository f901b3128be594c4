"""Log-probabilities of labels and their gradients against a softmax over all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.aside import held
from expertune.loss import log_probs
from expertune.loss.log_probs import Head, label_log_probs
from tests.cases import DEVICE
from tests.numerics import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.bfloat16, *([torch.float16] if DEVICE == "cuda" else [])]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped, scaled, warm": {"scale": 0.5, "softcap": 2.0, "inv_t": 1.25},
    "bias": {"has_bias": True},
}
NAMES = ("log_prob", "entropy", "dx of log_prob", "dx of both")


def draw(
    num_tokens: int, dtype: torch.dtype, *, has_bias: bool = False, **settings: Any
) -> tuple[Tensor, Tensor, Head]:
    generator = torch.Generator().manual_seed(num_tokens)
    vocabulary, width = 51, 16
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for shape in ((num_tokens, width), (vocabulary, width), (vocabulary,))
    )
    label = torch.randint(vocabulary, (num_tokens,), generator=generator).to(DEVICE)
    return hidden.requires_grad_(), label, Head(weight, bias if has_bias else None, **settings)


def plain(hidden: Tensor, label: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with all logits at once."""
    log_p = head.logits(hidden).log_softmax(-1)
    return log_p.gather(1, label.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == label


def results(given: tuple[Tensor, Tensor, Tensor], hidden: Tensor) -> list[Tensor]:
    """Outputs, then gradients as a trainer weights tokens: of the log-probabilities, and of the entropies too."""
    log_prob, entropy, _ = given
    weights = torch.linspace(-1, 1, len(hidden), device=hidden.device, dtype=log_prob.dtype)
    gradients = [
        torch.autograd.grad(total, hidden, retain_graph=True)[0]
        for total in ((log_prob * weights).sum(), (log_prob * weights).sum() + (entropy * weights.flip(0)).sum())
    ]
    return [log_prob.detach(), entropy.detach(), *gradients]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("num_tokens", "last"), [(0, 0), (0, 8), (1, 0), (8, 0), (21, 0), (21, 8), (21, 12), (21, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_no_worse_than_a_softmax_over_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int, last: int, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(log_probs, "NUM_TOKENS", 8)
    hidden, label, head = draw(num_tokens, dtype, **settings)
    exact = hidden.detach().double().requires_grad_()
    bias = None if head.bias_V is None else head.bias_V.double()
    precise = head._replace(weight_VD=head.weight_VD.double(), bias_V=bias)
    given, theirs = label_log_probs(hidden, label, head, last), plain(hidden, label, head)
    compared = results(given, hidden), results(theirs, hidden), results(plain(exact, label, precise), exact)
    for name, mine, other, right in zip(NAMES, *compared, strict=True):
        assert mine.dtype == other.dtype
        assert_no_worse(mine, other, right, name)
    assert torch.equal(given[2], theirs[2])


def test_no_more_logits_are_there_than_of_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as the logits of all tokens is made, and what is kept grows with the hidden states alone."""
    monkeypatch.setattr(log_probs, "NUM_TOKENS", 4)
    hidden, label, head = draw(24, torch.float32)
    label_log_probs(hidden.detach(), label, head)  # a GPU's first product makes cuBLAS's workspace
    saved: list[int] = []
    counting = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x)
    with counting, torch.profiler.profile(profile_memory=True) as profiler:
        log_prob, *_ = label_log_probs(hidden, label, head)
    assert sum(saved) == 2 * hidden.nbytes
    largest = max(max(event.cpu_memory_usage, event.device_memory_usage) for event in profiler.events())
    assert hidden.nbytes <= largest < 24 * 51 * 4
    log_prob.sum().backward()


@pytest.mark.parametrize("last", [0, 4, 6])
@pytest.mark.parametrize("num_tokens", [3, 4, 9])
def test_who_moves_what_is_saved_gets_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, last: int
) -> None:
    """A copy of it is taken when it is saved, and read in backward, which may come twice."""
    monkeypatch.setattr(log_probs, "NUM_TOKENS", 4)
    hidden, label, head = draw(num_tokens, torch.float32)
    (expected,) = torch.autograd.grad(label_log_probs(hidden, label, head, last)[0].sum(), hidden)
    with torch.autograd.graph.save_on_cpu(), held():
        log_prob, *_ = label_log_probs(hidden, label, head, last)
    for _ in range(2):
        (given,) = torch.autograd.grad(log_prob.sum(), hidden, retain_graph=True)
        assert torch.equal(given, expected)


def test_hidden_states_without_a_gradient_keep_nothing() -> None:
    hidden, label, head = draw(5, torch.float32)
    log_prob, entropy, is_top1 = label_log_probs(hidden.detach(), label, head)
    assert not (log_prob.requires_grad or entropy.requires_grad or is_top1.requires_grad)
    assert torch.equal(log_prob, label_log_probs(hidden, label, head)[0])
