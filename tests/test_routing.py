"""Routing moves data, so it is compared exactly."""

import pytest
import torch

from expertune.routing import combine, dispatch, sum_rows
from tests.cases import NUM_EXPERTS, ROUTINGS


@pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
def test_rows_are_the_stable_sort_of_the_choices(expert_TK: torch.Tensor) -> None:
    top_k = expert_TK.shape[1]
    choices = [(int(e), slot) for slot, e in enumerate(expert_TK.reshape(-1))]
    expected = sorted(choices)
    routing = dispatch(expert_TK, NUM_EXPERTS)
    assert routing.row_expert_N.tolist() == [e for e, _ in expected]
    assert routing.row_slot_N.tolist() == [slot for _, slot in expected]
    assert routing.row_token_N.tolist() == [slot // top_k for _, slot in expected]
    assert routing.ends_E.tolist() == [sum(e <= i for e, _ in expected) for i in range(NUM_EXPERTS)]
    rows = routing.token_row_TK.reshape(-1).tolist()
    assert [expected[row][1] for row in rows] == list(range(len(rows)))
    tensors = (routing.row_expert_N, routing.row_slot_N, routing.token_row_TK, routing.ends_E)
    assert {tensor.dtype for tensor in tensors} == {torch.int32}


def test_accepts_int32_choices() -> None:
    wide, narrow = (dispatch(ROUTINGS["even"].to(dtype), NUM_EXPERTS) for dtype in (torch.int64, torch.int32))
    assert torch.equal(wide.row_token_N, narrow.row_token_N)
    assert torch.equal(wide.ends_E, narrow.ends_E)


@pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
def test_sum_rows_is_the_backward_of_copying(expert_TK: torch.Tensor) -> None:
    routing = dispatch(expert_TK, NUM_EXPERTS)
    x_TD = torch.randn(expert_TK.shape[0], 5, dtype=torch.float64, requires_grad=True)
    x_ND = x_TD[routing.row_token_N.long()]
    dx_ND = torch.randn_like(x_ND)
    (expected,) = torch.autograd.grad(x_ND, x_TD, dx_ND)
    torch.testing.assert_close(sum_rows(dx_ND, routing.token_row_TK), expected, rtol=1e-14, atol=1e-14)


def test_combine_weights_each_row_of_a_token() -> None:
    expert_TK = ROUTINGS["even"]
    routing = dispatch(expert_TK, NUM_EXPERTS)
    y_ND = torch.randn(expert_TK.numel(), 5, dtype=torch.float64)
    weight_TK = torch.randn(expert_TK.shape, dtype=torch.float64)
    expected = sum(weight_TK[:, k, None] * y_ND[routing.token_row_TK[:, k].long()] for k in range(expert_TK.shape[1]))
    torch.testing.assert_close(combine(y_ND, weight_TK, routing.token_row_TK), expected, rtol=1e-14, atol=1e-14)
