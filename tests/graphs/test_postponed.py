"""Gradients of factors that a recorded pass leaves for after its replay: the same, without a copy."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertune import accumulate
from expertune.activations import Gate, HostGate, SwiGlu
from expertune.backends import native_torch, triton
from expertune.backends.protocol import Backend
from expertune.experts import experts
from expertune.graphs import recording
from expertune.graphs.piece import Piece
from expertune.graphs.recorder import Recorder
from expertune.shapes import ExpertsLayout, LoraFactors
from expertune.walk import ExpertsStep, Projection
from tests.cases import DEVICE, FEW_EXPERTS, NUM_FEW, later, needs_cuda, pair_id, runnable
from tests.graphs.replayed import FakeCapture, FakeHost, make_recorder

WIDTH, INNER = 16, 24
GATE = SwiGlu()
LAYOUT = ExpertsLayout(
    num_experts=NUM_FEW, model_width=WIDTH, expert_width=INNER, has_gate=True, is_transposed=False, has_bias=False
)


class Experts(nn.Module):
    """With adapters of these ranks on each projection, walked twice where asked."""

    def __init__(
        self, backend: Backend, dtype: torch.dtype, ranks: tuple[int, ...], times: int = 1, gate: Gate = GATE
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times = times
        self.step = ExpertsStep(layout=LAYOUT, gate=gate, backend=_adding(backend))
        self.expert_TK = FEW_EXPERTS.to(DEVICE)
        self.weights, self.factors = nn.ParameterList(), nn.ParameterList()
        for i, o in ((WIDTH, 2 * INNER), (INNER, WIDTH)):
            self.weights.append(nn.Parameter((torch.randn(NUM_FEW, o, i) / 4).to(DEVICE, dtype), False))
            for rank in ranks:
                for shape in ((NUM_FEW * rank, i), (o, rank * NUM_FEW)):
                    self.factors.append(nn.Parameter((torch.randn(shape) / 4).to(DEVICE)))

    def forward(self, x_TD: Tensor, weight_TK: Tensor) -> Tensor:
        half = len(self.factors) // 2
        pairs = [list(self.factors)[:half], list(self.factors)[half:]]
        first, second = (
            Projection(
                weight=weight,
                adapters=tuple(LoraFactors(a=a, b=b, scale=0.5) for a, b in zip(pair[::2], pair[1::2], strict=True)),
            )
            for weight, pair in zip(self.weights, pairs, strict=True)
        )
        for _ in range(self.times):
            x_TD = experts(
                x_TD, self.step.dispatch(self.expert_TK), weight_TK, (first, second), self.step, keeps_packed=True
            )
        return x_TD


def _adding(backend: Backend) -> Backend:
    steps = backend.steps()
    if steps.adds_in_place:
        return backend
    return replace(backend, steps=lambda: replace(steps, adds_in_place=True))  # type: ignore[type-var]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, capture: FakeCapture) -> Callable[..., tuple[Experts, Experts]]:
    """Experts that are recorded, and the same as they are without."""

    def make(*args: Any, **settings: Any) -> tuple[Experts, Experts]:
        recorded = Experts(*args, **settings)
        stock = copy.deepcopy(recorded)
        recorded.forward = Piece(recorded, make_recorder(capture))  # type: ignore[method-assign]
        return recorded, stock

    monkeypatch.setattr(recording, "_LARGE", 32)
    return make


def _loss(module: Callable[[Tensor, Tensor], Tensor], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(len(FEW_EXPERTS), WIDTH, generator=draw).to(DEVICE, dtype).requires_grad_()
    weight_TK = torch.rand(FEW_EXPERTS.shape, generator=draw).to(DEVICE).requires_grad_()
    dout_TD = torch.randn(len(FEW_EXPERTS), WIDTH, generator=draw).to(DEVICE, dtype)
    return (module(x_TD, weight_TK) * dout_TD).sum(), x_TD, weight_TK


@pytest.mark.parametrize(
    ("ranks", "times"),
    [pytest.param((8,), 1, id="one adapter"), pytest.param((4, 9), 2, marks=later(True), id="two, walked twice")],
)
@pytest.mark.parametrize(("backend", "dtype"), runnable(torch.float32, torch.bfloat16), ids=pair_id)
def test_batches_anew_and_added(
    pair: Callable[..., tuple[Experts, Experts]],
    capture: FakeCapture,
    backend: Backend,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    times: int,
) -> None:
    modules = pair(backend, dtype, ranks, times=times)
    for seed in range(6):
        inputs = []
        for module in modules:
            if seed < 3:
                module.zero_grad()
            loss, x_TD, weight_TK = _loss(module, seed, dtype)
            loss.backward()
            inputs.append([loss.detach(), x_TD.grad, weight_TK.grad, *(f.grad for f in module.factors)])
        if times == 1:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(*inputs, strict=True))
        else:  # two walks' gradients add up in another order
            torch.testing.assert_close(*inputs)
    assert capture.replays == 2 * 4
    (made,) = modules[0].forward._recordings.values()  # type: ignore[attr-defined]
    assert len(made._postponed) == times
    assert made._numbers_of_large == [0, 1], "of inputs: no factor's gradient is copied"


@needs_cuda
def test_real_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, so that one's replay writes to what the other's backward had made."""
    monkeypatch.setattr(recording, "_LARGE", 32)
    dtype = torch.bfloat16
    modules = [nn.ModuleList(Experts(triton.BACKEND, dtype, (8,)) for _ in range(2)) for _ in range(2)]
    recorder = Recorder(FakeHost())
    for layer in modules[0]:
        layer.forward = Piece(layer, recorder)

    def run(layers: nn.ModuleList, seed: int) -> list[Tensor]:
        loss, x_TD, weight_TK = _loss(lambda x, weight: layers[1](layers[0](x, weight), weight), seed, dtype)
        loss.backward()
        return [loss.detach(), x_TD.grad, weight_TK.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]

    for seed in range(9):
        if seed < 6:
            for layers in modules:
                layers.zero_grad()
        assert all(map(torch.equal, *(run(layers, seed) for layers in modules)))
        with torch.no_grad():  # so that factors that were packed before are stale
            for factor in (p for layers in modules for p in layers.parameters() if p.requires_grad):
                factor *= 0.9
    assert not recorder.refused
    for piece in recorder.pieces:
        (made,) = piece._recordings.values()
        assert len(made._postponed) == 1


def test_what_is_handed_out_is_not_added(pair: Callable[..., tuple[Experts, Experts]]) -> None:
    recorded, stock = pair(native_torch.BACKEND, torch.float32, (8,))
    for seed in range(5):
        _loss(recorded, seed, torch.float32)[0].backward()
    before = [factor.grad.clone() for factor in recorded.factors]
    found = [
        torch.autograd.grad(_loss(module, 7, torch.float32)[0], list(module.factors)) for module in (recorded, stock)
    ]
    assert all(map(torch.equal, *found))
    assert all(torch.equal(factor.grad, kept) for factor, kept in zip(recorded.factors, before, strict=True))


def _turned(h_NG: Tensor) -> Tensor:
    h_GN = h_NG.T.contiguous()
    return (F.silu(h_GN[:INNER]) * h_GN[INNER:]).T


def test_a_gate_of_the_hosts_may_give_gradients_of_any_strides(pair: Callable[..., tuple[Experts, Experts]]) -> None:
    modules = pair(native_torch.BACKEND, torch.float32, (8,), gate=HostGate(_turned))
    for seed in range(5):
        for module in modules:
            _loss(module, seed, torch.float32)[0].backward()
    (made,) = modules[0].forward._recordings.values()  # type: ignore[attr-defined]
    assert len(made._postponed) == 1
    for ours, theirs in zip(*(module.factors for module in modules), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_another_pass_at_the_same_time_postpones_nothing() -> None:
    module = Experts(native_torch.BACKEND, torch.float32, (8,))
    expected = torch.autograd.grad(_loss(module, 0, torch.float32)[0], list(module.factors))
    with accumulate.postponing([factor.detach().requires_grad_() for factor in module.factors]) as postponed:
        found = torch.autograd.grad(_loss(module, 0, torch.float32)[0], list(module.factors))
    assert all(map(torch.equal, found, expected))
    assert postponed == []
