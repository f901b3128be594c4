"""What only a GPU can show: races, the schedules of the Hopper kernel, graphs."""

import pytest
import torch
from torch import Tensor

from expertune import compiled
from expertune.activations import ClampedSwiGlu, Gate, GeGlu, SwiGlu
from expertune.backends import grouped_mm, triton
from expertune.backends.protocol import Backend
from expertune.experts import experts
from expertune.kernels.device import is_hopper
from expertune.kernels.program import Program, Programs
from expertune.shapes import Dispatch, ExpertsLayout, LoraFactors
from expertune.walk import ExpertsStep, Projection
from tests.cases import needs_cuda, problem

pytestmark = needs_cuda
CUDA = torch.device("cuda", 0)
DTYPE = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = DTYPE, device: torch.device = CUDA) -> Tensor:
    return torch.randn(*shape, device=device).mul_(0.05).to(dtype)


class _Layer:
    """Experts of the widths of Qwen3-30B-A3B, rank 64, with what a batch brings."""

    def __init__(self, num_tokens: int, device: torch.device = CUDA) -> None:
        torch.manual_seed(0)
        E, D, F, K, R = 128, 2048, 768, 8, 64
        layout = ExpertsLayout(
            num_experts=E, model_width=D, expert_width=F, has_gate=True, is_transposed=False, has_bias=False
        )
        self.step = ExpertsStep(layout=layout, gate=SwiGlu(), backend=triton.BACKEND)
        self.adapters = [
            LoraFactors(
                a=normal(E * R, i, dtype=torch.float32, device=device).requires_grad_(),
                b=normal(o, R * E, dtype=torch.float32, device=device).requires_grad_(),
                scale=2.0,
            )
            for i, o in ((D, 2 * F), (F, D))
        ]
        first, second = (
            Projection(weight=normal(E, o, i, device=device), adapters=(adapter,))
            for (i, o), adapter in zip(((D, 2 * F), (F, D)), self.adapters, strict=True)
        )
        self.projections = (first, second)
        self.x = torch.randn(num_tokens, D, device=device, dtype=DTYPE).requires_grad_()
        self.expert_TK = torch.rand(num_tokens, E, device=device).topk(K, dim=-1).indices
        self.weight = torch.rand(num_tokens, K, device=device).softmax(-1).requires_grad_()
        self.dout = torch.randn(num_tokens, D, device=device, dtype=DTYPE)

    def run(self) -> list[Tensor]:
        """Output and every gradient."""
        out = experts(self.x, self.step.dispatch(self.expert_TK), self.weight, self.projections, self.step)
        factors = [f for adapter in self.adapters for f in (adapter.a, adapter.b)]
        return [out.detach(), *torch.autograd.grad(out, [self.x, self.weight, *factors], self.dout)]


@pytest.fixture(params=[1024, 4096])
def layer(request: pytest.FixtureRequest) -> _Layer:
    if reason := triton.BACKEND.why_not(problem(DTYPE, 16)):
        pytest.skip(reason)
    return _Layer(request.param)


def test_every_run_has_the_same_bits(layer: _Layer) -> None:
    first = layer.run()
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(layer.run(), first, strict=True))


def test_a_captured_graph_has_the_same_bits(layer: _Layer) -> None:
    first, *_ = [layer.run() for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run()
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one_gives_the_same_bits(
    layer: _Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hooks of Accelerate call layers; what is noted there is repeated there."""
    from expertune.backends import triton_steps  # Triton, where it is

    programs = Programs()
    monkeypatch.setattr(triton_steps, "_programs", programs)
    other = torch.device("cuda", 1)
    there = _Layer(len(layer.x), other)
    for _ in range(4):
        first, results = layer.run(), there.run()
        assert torch.cuda.current_device() == CUDA.index
        assert all(result.device == other for result in results)
        assert all(torch.equal(a.to(CUDA), b) for a, b in zip(results, first, strict=True))
    made = {device: [type(m) for key, m in programs._known.items() if key[2] == device] for device in (CUDA, other)}
    assert Program in made[CUDA]
    assert made[other] == made[CUDA]


def test_nothing_waits_for_the_host(layer: _Layer) -> None:
    layer.run()
    for _ in range(3):  # run, watched, repeated
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_operator_of_a_compiled_model_has_the_same_bits(layer: _Layer) -> None:
    def run() -> Tensor:
        return compiled.experts(layer.x, layer.expert_TK, layer.weight, layer.projections, layer.step)

    plain = layer.run()
    factors = [f for adapter in layer.adapters for f in (adapter.a, adapter.b)]
    out = torch.compile(run, fullgraph=True, backend="aot_eager")()
    results = [out.detach(), *torch.autograd.grad(out, [layer.x, layer.weight, *factors], layer.dout)]
    assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))


# tokens, model width, expert width, experts a token, whether weights are transposed
LARGE: dict[str, tuple[int, int, int, int, bool]] = {
    "a million rows, h above 2³¹ elements": (131072, 256, 1152, 8, False),
    "weights above 2³¹ elements": (64, 2048, 1152, 8, False),
    # as Llama 4's: 128 experts in the larger model; each choice is a token of its own, 5,120 wide
    "transposed weights above 2³¹ elements": (64, 2048, 1152, 8, True),
    "tokens above 2³¹ elements": (430080, 5120, 64, 1, True),
}


@pytest.mark.parametrize(
    ("num_tokens", "model_width", "expert_width", "top_k", "is_transposed"), LARGE.values(), ids=LARGE
)
def test_offsets_beyond_32_bits(
    num_tokens: int, model_width: int, expert_width: int, top_k: int, is_transposed: bool
) -> None:
    if reason := triton.BACKEND.why_not(problem(DTYPE, 16)):
        pytest.skip(reason)
    E, D, F, K, R = 512, model_width, expert_width, top_k, 16
    layout = ExpertsLayout(
        num_experts=E, model_width=D, expert_width=F, has_gate=True, is_transposed=is_transposed, has_bias=False
    )
    torch.manual_seed(0)
    factors = [
        normal(*shape, dtype=torch.float32).requires_grad_()
        for shape in ((E * R, D), (2 * F, R * E), (E * R, F), (D, R * E))
    ]
    first, second = (
        Projection(
            weight=normal(E, *((i, o) if is_transposed else (o, i))), adapters=(LoraFactors(a=a, b=b, scale=2.0),)
        )
        for (i, o), a, b in (((D, 2 * F), *factors[:2]), ((F, D), *factors[2:]))
    )
    x = torch.randn(num_tokens, D, device=CUDA, dtype=DTYPE).requires_grad_()
    expert_TK = torch.rand(num_tokens, E, device=CUDA).topk(K, dim=-1).indices
    weight = torch.rand(num_tokens, K, device=CUDA).requires_grad_()
    dout = torch.randn(num_tokens, D, device=CUDA, dtype=DTYPE)

    def run(backend: Backend) -> list[Tensor]:
        step = ExpertsStep(layout=layout, gate=SwiGlu(), backend=backend)
        out = experts(x, step.dispatch(expert_TK), weight, (first, second), step)
        return [out.detach(), *torch.autograd.grad(out, [x, weight, *factors], dout)]

    for ours, theirs in zip(run(triton.BACKEND), run(grouped_mm.BACKEND), strict=True):
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()


def product(
    width: int, width_out: int, hot_rows: int, is_k_contiguous: bool
) -> tuple[Dispatch, Tensor, Tensor, Tensor, Tensor]:
    """The routing, `x`, mid, `w` and `b` of 16 experts, one of which may have more row tiles than go together."""
    from expertune.backends.triton_steps import STEPS  # Triton and Gluon, where they are

    torch.manual_seed(0)
    E, T, K, R = 16, 700, 4, 24
    expert_TK = torch.rand(T, E, device=CUDA).topk(K, dim=-1).indices
    if hot_rows:
        expert_TK = torch.cat([expert_TK.reshape(-1, 1), torch.full((hot_rows, 1), 5, device=CUDA)])
    x, mid = normal(expert_TK.numel(), width), normal(expert_TK.numel(), R)
    w, b = normal(E, width, width_out), normal(E, R, width_out)
    if is_k_contiguous:
        w, b = w.mT.contiguous().mT, b.mT.contiguous().mT
    return STEPS.dispatch(expert_TK, E), x, mid, w, b


@pytest.mark.parametrize("gate", [None, SwiGlu(), ClampedSwiGlu(1.702, 7.0)], ids=["no gate", "silu", "clamped"])
@pytest.mark.parametrize("is_k_contiguous", [True, False])
@pytest.mark.parametrize(
    ("width", "width_out", "hot_rows"), [(2048, 1536, 0), (768, 2048, 0), (200, 328, 0), (256, 1064, 5000)]
)
def test_both_schedules_on_hopper_have_the_same_bits(
    width: int, width_out: int, hot_rows: int, is_k_contiguous: bool, gate: Gate | None
) -> None:
    if not is_hopper(CUDA):
        pytest.skip("needs a Hopper GPU")
    from expertune.backends.triton_steps import STEPS, gate_kernel  # Triton and Gluon, where they are
    from expertune.kernels import linear_hopper

    routing, x, mid, w, b = product(width, width_out, hot_rows, is_k_contiguous)
    bias = normal(w.shape[0], width_out)
    kernel = None if gate is None else gate_kernel(gate)
    if kernel is not None and not linear_hopper.fuses(kernel, w):
        pytest.skip("this gate is a launch of its own for such weights")
    assert routing.tiles is not None
    cooperative, ping_pong = (
        linear_hopper.linear(
            x, w, routing.tiles, mid_NR=mid, b_ERO=b, bias_EO=bias, gate=kernel, is_cooperative=is_cooperative
        )
        for is_cooperative in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(cooperative, ping_pong, strict=True))
    y_NO, a_NF = cooperative
    twin = STEPS.linear(x.float(), w.float(), routing, low_rank=(mid.float(), b.float()), bias_EO=bias.float())
    assert (y_NO.float() - twin).norm() <= 0.005 * twin.norm()
    if gate is not None:
        assert torch.equal(a_NF, STEPS.gate_forward(gate, y_NO))


@pytest.mark.parametrize(
    "gate", [SwiGlu(), SwiGlu(is_concatenated=False), GeGlu("none"), ClampedSwiGlu(1.702, 7.0)], ids=str
)
@pytest.mark.parametrize("is_k_contiguous", [True, False])
@pytest.mark.parametrize(
    ("width", "width_out", "hot_rows"), [(2048, 768, 0), (64, 1024, 9000), (200, 328, 0), (256, 1064, 5000)]
)
def test_a_gates_backward_beside_the_product_on_hopper_has_the_same_bits(
    width: int, width_out: int, hot_rows: int, is_k_contiguous: bool, gate: Gate
) -> None:
    """Also where the product is short, so that it has to wait for the gate."""
    if not is_hopper(CUDA):
        pytest.skip("needs a Hopper GPU")
    from expertune.backends.triton_steps import STEPS  # Triton and Gluon, where they are

    routing, dy_NI, mid_NR, w_EIF, b_ERF = product(width, width_out, hot_rows, is_k_contiguous)
    h_NG = 40 * normal(dy_NI.shape[0], 2 * width_out)
    weight_TK = torch.rand(routing.token_row_TK.shape, device=CUDA)
    terms = {"low_rank": (mid_NR, b_ERF)}
    da_NF = STEPS.linear(dy_NI, w_EIF, routing, **terms)
    a_NF, dh_NG, dweight_TK = STEPS.gate_backward(gate, h_NG, da_NF, weight_TK, routing)
    for overwrites in [False] * 50 + [True]:
        got = STEPS.linear_gate_backward(gate, dy_NI, w_EIF, h_NG, weight_TK, routing, overwrites=overwrites, **terms)
        assert torch.equal(got[0], a_NF)
        assert torch.equal(got[1], dh_NG)
        torch.testing.assert_close(got[2], dweight_TK, rtol=1e-5, atol=1e-5 * dweight_TK.abs().max().item())
