"""The kernels that route tokens, against the same by torch's own operations, forward and backward."""

import pytest
import torch
from torch import Tensor

from expertune.router import _Route, plain_route
from expertune.shapes import RoutingRule
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.numerics import assert_no_worse

pytest.importorskip("triton")
from expertune.kernels.router import route, route_backward

pytestmark = needs_kernels
RULES = [RoutingRule(3, is_sigmoid, is_normed, 1.5) for is_sigmoid in (False, True) for is_normed in (False, True)]


def draw(num_tokens: int, num_experts: int, dtype: torch.dtype) -> Tensor:
    """No two of a token's logits equal, so that the choice is one of values."""
    generator = torch.Generator().manual_seed(num_experts)
    rows = [torch.randperm(num_experts, generator=generator) / num_experts * 8 - 4 for _ in range(num_tokens)]
    return torch.stack(rows).to(DEVICE, dtype)


def kernels(
    logits: Tensor, bias: Tensor | None, rule: RoutingRule, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    chosen = torch.full((len(logits), rule.top_k), -1, device=DEVICE) if index is None else index
    score = torch.full((len(logits), rule.top_k), torch.nan, device=DEVICE)
    route(logits, bias, chosen, score, rule, is_chosen=index is not None)
    return score, chosen


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (40, 60), (9, 128), (5, 300)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_scores_and_gradients_are_no_worse_than_torchs(
    dtype: torch.dtype, shape: tuple[int, int], rule: RoutingRule
) -> None:
    logits = draw(*shape, dtype)
    score, index = kernels(logits, None, rule)
    # in float32: in 16 bits neighbouring sigmoids round to one
    assert torch.equal(index, logits.float().topk(rule.top_k).indices)
    dscore = torch.randn(score.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = [logits.detach().clone().requires_grad_(), logits.double().requires_grad_()]
    others = [plain_route(leaf, None, rule, index)[0] for leaf in leaves]
    for other in others:
        other.backward(dscore.to(other.dtype))
    assert_no_worse(score, others[0].detach(), others[1].detach(), "score")
    dlogits = route_backward(logits, index, dscore, rule)
    assert dlogits.dtype == dtype
    assert_no_worse(dlogits, leaves[0].grad, leaves[1].grad, "dlogits")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_bias_moves_the_choice_and_no_score(rule: RoutingRule) -> None:
    logits = draw(20, 60, torch.float32)
    bias = torch.randn(60, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    score, index = kernels(logits, bias, rule)
    expected, chosen = plain_route(logits, bias, rule)
    assert torch.equal(index, chosen)
    assert not torch.equal(index, logits.topk(rule.top_k).indices)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("groups", [(2, 1), (8, 3), (16, 4)], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_only_the_best_groups_count(rule: RoutingRule, groups: tuple[int, int], has_bias: bool) -> None:
    logits = draw(40, 64, torch.float32)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2)).to(DEVICE) if has_bias else None
    num_groups, used = groups
    score, index = kernels(logits, bias, rule._replace(num_groups=num_groups, top_groups=used))
    expected, chosen = plain_route(logits, bias, rule._replace(num_groups=num_groups, top_groups=used))
    assert torch.equal(index, chosen)
    torch.testing.assert_close(score, expected)
    assert ((index // (64 // num_groups)).sort().values.diff() != 0).sum(-1).max() < used
    assert not torch.equal(index, plain_route(logits, bias, rule)[1])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_given_experts_are_scored(rule: RoutingRule) -> None:
    logits = draw(20, 60, torch.float32)
    index = draw(20, 60, torch.float64).argsort(-1)[:, : rule.top_k].contiguous()
    score, _ = kernels(logits, None, rule, index)
    torch.testing.assert_close(score, plain_route(logits, None, rule, index)[0])


@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_is_one_node_of_autograd(rule: RoutingRule, is_chosen: bool) -> None:
    logits = draw(20, 60, torch.float32)
    bias = torch.randn(60, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    index = draw(20, 60, torch.float64).argsort(-1)[:, : rule.top_k].contiguous() if is_chosen else None
    results = []
    for function in (_Route.apply, plain_route):
        leaf = logits.clone().requires_grad_()
        score, used = function(leaf, bias, rule, index)
        assert not used.requires_grad
        assert index is None or torch.equal(used, index)
        score.cos().sum().backward()
        results.append((score.detach(), used, leaf.grad))
    torch.testing.assert_close(*results)


def test_of_equals_the_first_is_chosen() -> None:
    logits = torch.zeros(4, 60, device=DEVICE)
    logits[1, 7] = logits[1, 30] = 1.0
    _, index = kernels(logits, None, RULES[1])
    assert index.tolist() == [[0, 1, 2], [7, 30, 0], [0, 1, 2], [0, 1, 2]]


def test_experts_of_what_is_no_number_exist() -> None:
    logits = torch.full((4, 60), torch.nan, device=DEVICE)
    for rule in RULES:
        _, index = kernels(logits, None, rule)
        assert ((index >= 0) & (index < 60)).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("best", [0, 3])
def test_no_expert_is_chosen_twice_where_few_have_a_logit(rule: RoutingRule, best: int) -> None:
    """As of a host that masks experts with minus infinity."""
    logits = torch.full((1, 8), -torch.inf, device=DEVICE)
    logits[0, best] = 1.0
    score, index = kernels(logits, None, rule)
    assert index[0, 0] == best
    assert len(set(index[0].tolist())) == rule.top_k
    torch.testing.assert_close(score, plain_route(logits, None, rule, index)[0])
