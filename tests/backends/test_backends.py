"""Every backend's products against their definition, in every dtype that it takes."""

import pytest
import torch

from expertune.backends import PREFERRED, choose, triton
from expertune.backends.protocol import Backend
from expertune.shapes import Problem
from tests.cases import DEVICE, NUM_EXPERTS, ROUTINGS, crossed, pair_id, runnable
from tests.numerics import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [(24, 16), (136, 304), (304, 136)]


def problem(dtype: torch.dtype = torch.float32, device: str = "cpu", widths: tuple[int, ...] = (32,), **kw) -> Problem:  # type: ignore[no-untyped-def]
    return Problem(device=device, capability=kw.get("capability"), dtype=dtype, widths=widths)


@pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), runnable(*DTYPES), ids=pair_id)
def test_products_match_their_definition(
    backend: Backend, is_transposed: bool, dtype: torch.dtype, expert_TK: torch.Tensor
) -> None:
    torch.manual_seed(0)
    routing = backend.steps().dispatch(expert_TK.to(DEVICE), NUM_EXPERTS)
    experts = routing.row_expert_N.long()
    x_NI = torch.randn(len(experts), 16).to(DEVICE, dtype)
    u_NO = torch.randn(len(experts), 24).to(DEVICE, dtype)
    w_EIO = torch.randn(NUM_EXPERTS, 16, 24).to(DEVICE, dtype)
    if is_transposed:
        w_EIO = w_EIO.mT.contiguous().mT

    def define_matmul(x, w):  # type: ignore[no-untyped-def]
        return torch.einsum("ni,nio->no", x, w[experts])

    y_NO = backend.steps().linear(x_NI, w_EIO, routing)
    assert_no_worse(y_NO, define_matmul(x_NI, w_EIO), define_matmul(x_NI.double(), w_EIO.double()), "matmul")
    o_EOI = backend.steps().outer(u_NO, x_NI, routing)
    plain, truth = (define_outer(u, v, experts) for u, v in ((u_NO, x_NI), (u_NO.double(), x_NI.double())))
    assert_no_worse(o_EOI, plain, truth, "outer")


def define_outer(u_NO: torch.Tensor, v_NI: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(experts, NUM_EXPERTS).to(u_NO.dtype)
    return torch.einsum("ne,no,ni->eoi", one_hot, u_NO, v_NI)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("expert_TK", "widths"), crossed(WIDTHS, WIDTHS[0], ("empty experts", "one hot expert")))
@pytest.mark.parametrize(("backend", "dtype"), runnable(*DTYPES), ids=pair_id)
def test_gradients_of_weights(
    backend: Backend, dtype: torch.dtype, expert_TK: torch.Tensor, widths: tuple[int, int], adds: bool
) -> None:
    """Wide ones, which the kernels cut in another way, or leave to torch."""
    torch.manual_seed(0)
    routing = backend.steps().dispatch(expert_TK.to(DEVICE), NUM_EXPERTS)
    experts = routing.row_expert_N.long()
    u_NO, v_NI = (torch.randn(len(experts), width).to(DEVICE, dtype) for width in widths)
    before = torch.randn(NUM_EXPERTS, *widths).to(DEVICE, dtype) if adds else None
    poison = torch.full((NUM_EXPERTS, *widths), torch.nan, dtype=dtype, device=DEVICE)
    del poison  # its memory is next
    total = None if before is None else before.clone()
    given = backend.steps().outer(u_NO, v_NI, routing, total)
    assert (given is None) is adds
    plain, truth = (define_outer(u, v, experts) for u, v in ((u_NO, v_NI), (u_NO.double(), v_NI.double())))
    result = given if total is None else total
    if before is not None:
        plain, truth = plain + before, truth + before.double()
    assert result is not None
    assert_no_worse(result, plain, truth, "outer")
    if before is None:
        absent = sorted(set(range(NUM_EXPERTS)) - set(experts.tolist()))
        assert not result[absent].any(), "an expert without rows has a gradient"


def test_auto_takes_the_best_that_runs_and_says_why_others_do_not() -> None:
    assert choose(problem())[0].name == "grouped_mm"
    backend, passed_over = choose(problem(widths=(30,)))
    assert backend.name == "native_torch"
    assert passed_over[-1] == "grouped_mm: needs rows that are multiples of 16 bytes, got widths [30] in torch.float32"
    assert passed_over[0].startswith("triton: needs ")
    assert "got torch.float64" in choose(problem(torch.float64))[1][-1]


def test_auto_passes_over_what_runs_slowly_and_a_name_does_not() -> None:
    turing = problem(torch.float16, device="cuda", capability=(7, 5))
    backend, passed_over = choose(turing)
    assert backend.name == "native_torch"
    assert passed_over[0].startswith(("triton: is slow before compute capability 8.0", "triton: needs Triton"))
    ampere = problem(torch.bfloat16, device="cuda", capability=(8, 0))
    if triton.BACKEND.why_not(ampere) is None:
        assert choose(turing, "triton")[0].name == choose(ampere)[0].name == "triton"


def test_a_name_is_done_or_refused() -> None:
    assert choose(problem(), "native_torch") == (PREFERRED[-1], [])
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'; choose one of auto, triton, grouped_mm"):
        choose(problem(), "tritn")
    with pytest.raises(ValueError, match=r"'grouped_mm' cannot run here: it needs .* got torch.float64"):
        choose(problem(torch.float64), "grouped_mm")
    with pytest.raises(ValueError, match=r"compute capability 8.0 or later, got 7.5"):
        choose(problem(torch.float16, device="cuda", capability=(7, 5)), "grouped_mm")


def test_no_backend_is_an_error_with_every_reason() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)no backend can run this.*grouped_mm: needs.*native_torch: needs"):
        choose(problem(torch.uint8))
