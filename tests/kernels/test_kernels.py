"""Each kernel against plain torch: data movement exactly, arithmetic no worse than the same in torch.

On a GPU they run there; on a CPU in Triton's interpreter, if it was asked for: `TRITON_INTERPRET=1 pytest`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.activations import ClampedSwiGlu, Gate, GeGlu, ReluSquared, SwiGlu
from expertune.backends import native_torch, torch_steps, triton
from expertune.backends.protocol import FactorSide
from expertune.shapes import Dispatch, LoraFactors
from expertune.weights.dense import DenseWeights
from tests.cases import DEVICE, KERNEL_DTYPES, NUM_EXPERTS, ROUTINGS, crossed, later, needs_kernels
from tests.numerics import assert_no_worse

pytestmark = needs_kernels

WIDTH, OUT = 72, 40
GATES = {
    "silu": SwiGlu(),
    "silu interleaved": SwiGlu(is_concatenated=False),
    "gelu": GeGlu("none"),
    "gelu tanh interleaved": GeGlu("tanh", is_concatenated=False),
    "clamped": ClampedSwiGlu(1.702, 1.0),
    "clamped concatenated": ClampedSwiGlu(1.702, 1.0, is_concatenated=True),
    "clamped, not shifted": ClampedSwiGlu(1.0, 1.0, shift=0.0, is_concatenated=True),
    "relu²": ReluSquared(),
}
FUSED = GATES if DEVICE.type == "cuda" else {"silu": GATES["silu"]}  # elsewhere than on Hopper it is two steps
OF_GATES = ("even", "top-1", "zero tokens")  # they read nothing of a routing but the router's weights


def steps():  # type: ignore[no-untyped-def]
    return triton.BACKEND.steps()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def adapter(rank: int) -> LoraFactors:
    return LoraFactors(a=normal(NUM_EXPERTS * rank, WIDTH), b=normal(OUT, rank * NUM_EXPERTS, seed=1), scale=1.5)


@pytest.fixture(params=ROUTINGS.values(), ids=ROUTINGS)
def routing(request: pytest.FixtureRequest) -> Dispatch:
    return steps().dispatch(request.param.to(DEVICE), NUM_EXPERTS)  # type: ignore[no-any-return]


class TestRouting:
    @pytest.mark.parametrize("expert_TK", ROUTINGS.values(), ids=ROUTINGS)
    def test_is_the_stable_sort(self, expert_TK: Tensor) -> None:
        ours = steps().dispatch(expert_TK.to(DEVICE), NUM_EXPERTS)
        plain = native_torch.STEPS.dispatch(expert_TK.to(DEVICE), NUM_EXPERTS)
        for name in ("row_slot_N", "row_expert_N", "token_row_TK", "ends_E"):
            assert torch.equal(getattr(ours, name), getattr(plain, name)), name

    @pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(700, 4, 37), (1500, 3, 128), (9, 8, 512)])
    def test_several_blocks_and_many_experts(self, num_tokens: int, top_k: int, num_experts: int) -> None:
        expert_TK = normal(num_tokens, num_experts).topk(top_k, dim=-1).indices
        ours, plain = (s.dispatch(expert_TK, num_experts) for s in (steps(), native_torch.STEPS))
        assert torch.equal(ours.row_slot_N, plain.row_slot_N)
        assert torch.equal(ours.token_row_TK, plain.token_row_TK)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_choices_that_are_a_part_of_a_sort(self, top_k: int) -> None:
        """One choice a token, cut out of more, is still strided when it is flattened."""
        expert_TK = normal(19, NUM_EXPERTS).sort(dim=-1).indices[:, :top_k]
        ours, plain = (s.dispatch(expert_TK, NUM_EXPERTS) for s in (steps(), native_torch.STEPS))
        assert torch.equal(ours.row_expert_N, plain.row_expert_N)
        assert torch.equal(ours.token_row_TK, plain.token_row_TK)

    def test_tiles_cover_each_experts_rows_once(self, routing: Dispatch) -> None:
        tiles = routing.tiles
        assert tiles is not None
        count = int(tiles.count)
        assert count <= len(tiles.expert)
        ends = routing.ends_E.tolist()
        starts = [0, *ends[:-1]]
        expected = [(e, row) for e in range(NUM_EXPERTS) for row in range(starts[e], ends[e], tiles.rows)]
        assert list(zip(tiles.expert[:count].tolist(), tiles.row[:count].tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
class TestProducts:
    @pytest.mark.parametrize("is_k_contiguous", [False, True])
    @pytest.mark.parametrize(("routing", "rank"), crossed([0, 8, 24], 24), indirect=["routing"])
    def test_linear_with_low_rank_and_bias(
        self, routing: Dispatch, dtype: torch.dtype, rank: int, is_k_contiguous: bool
    ) -> None:
        x_NI, w_EIO = (
            normal(len(routing.row_expert_N), WIDTH, dtype=dtype),
            normal(NUM_EXPERTS, WIDTH, OUT, dtype=dtype),
        )
        mid_NR, b_ERO = (
            normal(x_NI.shape[0], max(rank, 1), dtype=dtype),
            normal(NUM_EXPERTS, max(rank, 1), OUT, dtype=dtype),
        )
        bias_EO = normal(NUM_EXPERTS, OUT, dtype=dtype)
        if is_k_contiguous:
            w_EIO, b_ERO = w_EIO.mT.contiguous().mT, b_ERO.mT.contiguous().mT
        low_rank = (mid_NR, b_ERO) if rank else None
        y_NO = steps().linear(x_NI, w_EIO, routing, low_rank=low_rank, bias_EO=bias_EO)

        def define(to: torch.dtype) -> Tensor:
            e = routing.row_expert_N.long()
            y = torch.einsum("ni,nio->no", x_NI.to(to), w_EIO.to(to)[e]) + bias_EO.to(to)[e]
            return y + torch.einsum("nr,nro->no", mid_NR.to(to), b_ERO.to(to)[e]) if rank else y

        assert_no_worse(y_NO, define(dtype), define(torch.float64))

    @pytest.mark.parametrize(("routing", "rank"), crossed([8, 24, 136], 24), indirect=["routing"])
    def test_gather_copies_exactly_and_shrinks(self, routing: Dispatch, dtype: torch.dtype, rank: int) -> None:
        num_tokens = routing.token_row_TK.shape[0]
        x_TI, a_ERI = normal(num_tokens, WIDTH, dtype=dtype), normal(NUM_EXPERTS, rank, WIDTH, dtype=dtype)
        x_NI, mid_NR = steps().gather(x_TI, a_ERI, routing)
        assert torch.equal(x_NI, x_TI[routing.row_token_N.long()])
        assert torch.equal(steps().shrink(x_NI, a_ERI.mT.contiguous().mT, routing), mid_NR)
        plain = native_torch.STEPS.shrink(x_NI, a_ERI, routing)
        assert_no_worse(mid_NR, plain, native_torch.STEPS.shrink(x_NI.double(), a_ERI.double(), routing))

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("by_token", [False, True])
    @pytest.mark.parametrize(("routing", "ranks"), crossed([(8,), (24,), (4, 9)], (4, 9)), indirect=["routing"])
    def test_factor_gradients(
        self, routing: Dispatch, dtype: torch.dtype, ranks: tuple[int, ...], by_token: bool, weighted: bool
    ) -> None:
        adapters = [adapter(rank) for rank in ranks]
        num_rows = routing.token_row_TK.shape[0] if by_token else len(routing.row_expert_N)
        rank = -(-sum(ranks) // 8) * 8
        x, dy = normal(num_rows, WIDTH, dtype=dtype), normal(num_rows, OUT, dtype=dtype)
        mid_NR = normal(len(routing.row_expert_N), rank, dtype=dtype)
        weight_TK = normal(*routing.token_row_TK.shape) if weighted else None
        exact = None if weight_TK is None else weight_TK.double()
        # both ways of reading rows, each on both sides
        sides = FactorSide(x, mid_NR, by_token), FactorSide(dy, mid_NR.flip(0), by_token)
        exact_sides = [FactorSide(s.wide.double(), s.narrow_NR.double(), by_token) for s in sides]
        no_sums = [None] * 2 * len(ranks)
        ours = steps().factor_grads(*sides, adapters, routing, no_sums, weight_TK)
        plain = native_torch.STEPS.factor_grads(*sides, adapters, routing, no_sums, weight_TK)
        truth = native_torch.STEPS.factor_grads(*exact_sides, adapters, routing, no_sums, exact)
        assert len(ours) == 2 * len(ranks)
        for i, (got, expected, true) in enumerate(zip(ours, plain, truth, strict=True)):
            assert got.shape == true.shape
            assert_no_worse(got, expected, true, f"factor {i}")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("ranks", [(8,), (3,), (8, 16)], ids=str)
def test_packing_is_exact(ranks: tuple[int, ...], is_transposed: bool, dtype: torch.dtype) -> None:
    adapters = [adapter(rank) for rank in ranks]
    weights = DenseWeights(normal(NUM_EXPERTS, WIDTH, OUT, dtype=dtype), is_transposed)
    projections = [(adapters, weights), ([], weights), (adapters, weights)]
    for ours, plain in zip(steps().pack(projections), native_torch.STEPS.pack(projections), strict=True):
        assert (ours is None) is (plain is None)
        if ours is not None:
            assert torch.equal(ours.a_ERI, plain.a_ERI)
            assert torch.equal(ours.b_EOR, plain.b_EOR)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("routing", [ROUTINGS[name] for name in OF_GATES], ids=OF_GATES, indirect=True)
def test_gates(routing: Dispatch, gate: Gate, dtype: torch.dtype) -> None:
    num_rows = len(routing.row_expert_N)
    # beyond one block of columns, and at the clamp on neither side by rounding
    width = 600 if isinstance(gate, ReluSquared) else 300
    h_NG, da_NF = normal(num_rows, 600, dtype=dtype) * 1.5, normal(num_rows, width, dtype=dtype)
    weight_TK = normal(*routing.token_row_TK.shape)
    before = h_NG.clone()
    results = [steps().gate_forward(gate, h_NG), *steps().gate_backward(gate, h_NG, da_NF.clone(), weight_TK, routing)]
    assert torch.equal(h_NG, before), "the gate wrote into what was saved for backward"
    h = h_NG.clone()
    over = steps().gate_backward(gate, h, da_NF.clone(), weight_TK, routing, overwrites=True)
    assert all(torch.equal(got, expected) for got, expected in zip(over, results[1:], strict=True))

    def define(to: torch.dtype) -> list[Tensor]:
        h, weight = h_NG.to(to), weight_TK.to(torch.promote_types(to, torch.float32))
        return [gate.forward(h), *torch_steps.gate_backward(gate, h, da_NF.to(to), weight, routing)]

    names = ("a", "a again", "dh", "router")
    for name, ours, plain, truth in zip(names, results, define(dtype), define(torch.float64), strict=True):
        assert_no_worse(ours, plain.to(ours.dtype), truth, name)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_what_is_no_number_comes_out_of_a_gate_as_none(gate: Gate) -> None:
    """A trainer looks at the loss to see that training is over."""
    h_NG = torch.zeros(5, 600, device=DEVICE)
    h_NG.view(-1)[[5, 304, 601]] = float("nan")
    expected = gate.forward(h_NG).isnan()
    assert expected.any()
    assert torch.equal(steps().gate_forward(gate, h_NG).isnan(), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("is_k_contiguous", [False, pytest.param(True, marks=later(True))])
@pytest.mark.parametrize("gate", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("routing", [ROUTINGS["one hot expert"]], ids=["one hot expert"], indirect=True)
def test_a_gated_linear_is_the_gate_of_the_linear(
    routing: Dispatch, gate: Gate, is_k_contiguous: bool, dtype: torch.dtype
) -> None:
    x_NI, w_EIO = normal(len(routing.row_expert_N), WIDTH, dtype=dtype), normal(NUM_EXPERTS, WIDTH, 304, dtype=dtype)
    mid_NR, b_ERO = normal(x_NI.shape[0], 8, dtype=dtype), normal(NUM_EXPERTS, 8, 304, dtype=dtype)
    if is_k_contiguous:
        w_EIO, b_ERO = w_EIO.mT.contiguous().mT, b_ERO.mT.contiguous().mT
    terms = {"low_rank": (mid_NR, b_ERO), "bias_EO": normal(NUM_EXPERTS, 304, dtype=dtype)}
    h_NG, a_NF = steps().gated_linear(gate, x_NI, w_EIO, routing, **terms)
    assert torch.equal(h_NG, steps().linear(x_NI, w_EIO, routing, **terms))
    assert torch.equal(a_NF, steps().gate_forward(gate, h_NG))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_combine(routing: Dispatch, weighted: bool, dtype: torch.dtype) -> None:
    y_ND = normal(len(routing.row_expert_N), WIDTH, dtype=dtype)
    weight_TK = F.softmax(normal(*routing.token_row_TK.shape), dim=-1) if weighted else None
    plain = native_torch.STEPS.combine(y_ND, weight_TK, routing)
    truth = native_torch.STEPS.combine(y_ND.double(), None if weight_TK is None else weight_TK.double(), routing)
    assert_no_worse(steps().combine(y_ND, weight_TK, routing), plain, truth)
