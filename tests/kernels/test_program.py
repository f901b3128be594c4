"""Programs: the third pass of a shape is repeated launch by launch, and nothing can tell."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.activations import ClampedSwiGlu, Gate, HostGate, SwiGlu
from expertune.backends import triton
from expertune.experts import experts
from expertune.kernels import plan, program, repack
from expertune.shapes import ExpertsLayout, LoraFactors
from expertune.walk import ExpertsStep, Projection
from tests.cases import DEVICE, FEW_EXPERTS, KERNEL_DTYPES, NUM_FEW, needs_kernels

DTYPES = [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2]
pytestmark = needs_kernels
E, D, F, R = NUM_FEW, 16, 24, 8


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> program.Programs:
    from expertune.backends import triton_steps

    fresh = program.Programs()
    monkeypatch.setattr(triton_steps, "_programs", fresh)
    return fresh


def _made(programs: program.Programs) -> int:
    return sum(isinstance(known, program.Program) for known in programs._known.values())


class _Layer:
    """One layer's experts, with its adapters."""

    def __init__(self, gate: Gate, *, has_bias: bool = False, is_transposed: bool = False, ranks: Any = (R,)) -> None:
        layout = ExpertsLayout(
            num_experts=E, model_width=D, expert_width=F, has_gate=True, is_transposed=is_transposed, has_bias=has_bias
        )
        self.step = ExpertsStep(layout=layout, gate=gate, backend=triton.BACKEND)
        self.parts = tuple(self._projection(layout, i, o, ranks) for i, o in ((D, 2 * F), (F, D)))

    def _projection(self, layout: ExpertsLayout, i: int, o: int, ranks: tuple[int, ...]) -> Projection:
        shape = (E, i, o) if layout.is_transposed else (E, o, i)
        return Projection(
            weight=(torch.randn(shape, device=DEVICE) / 8).to(DTYPES[0]),
            bias=torch.randn(E, o, device=DEVICE).to(DTYPES[0]) if layout.has_bias else None,
            adapters=tuple(
                LoraFactors(
                    a=(torch.randn(E * r, i, device=DEVICE) / 8).requires_grad_(),
                    b=(torch.randn(o, r * E, device=DEVICE) / 8).requires_grad_(),
                    scale=0.5,
                )
                for r in ranks
            ),
        )

    def run(self, expert_TK: Tensor, seed: int, **backward: Any) -> list[Tensor]:
        """Output and gradients for inputs of a seed."""
        torch.manual_seed(seed)
        expert_TK = expert_TK.to(DEVICE)
        x = torch.randn(len(expert_TK), D, device=DEVICE, dtype=DTYPES[0], requires_grad=True)
        weight = torch.rand(expert_TK.shape, device=DEVICE, requires_grad=True)
        out = experts(x, self.step.dispatch(expert_TK), weight, (self.parts[0], self.parts[1]), self.step)
        factors = [f for p in self.parts for a in p.adapters for f in (a.a, a.b)]
        grads = torch.autograd.grad(out, [x, weight, *factors], torch.randn_like(out), **backward)
        return [out.detach(), *grads]


LAYERS: dict[str, Callable[[], _Layer]] = {
    "silu": lambda: _Layer(SwiGlu()),
    "no adapter": lambda: _Layer(SwiGlu(), ranks=()),
    "clamped, biases, transposed": lambda: _Layer(ClampedSwiGlu(1.702, 7.0), has_bias=True, is_transposed=True),
}


@pytest.mark.parametrize("most_at_once", [2**30, -1], ids=["at once", "one by one"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_repeated_pass_equals_one_that_ran(
    programs: program.Programs, monkeypatch: pytest.MonkeyPatch, make: Callable[[], _Layer], most_at_once: int
) -> None:
    monkeypatch.setattr(plan, "_MOST_AT_ONCE", most_at_once)
    layer = make()
    layer.run(FEW_EXPERTS, 0)
    assert _made(programs) == 0, "a shape met once is not worth noting"
    layer.run(FEW_EXPERTS, 0)
    repeated = layer.run(FEW_EXPERTS.flip(0), 1)
    num_made = _made(programs)
    monkeypatch.setattr(programs, "_known", {})
    assert all(map(torch.equal, repeated, layer.run(FEW_EXPERTS.flip(0), 1)))
    assert num_made == (3 if layer.parts[0].adapters else 1), "the sort; forward and backward, where we gather the rows"


def test_nothing_is_noted_of_a_gate_that_only_the_host_knows(programs: program.Programs) -> None:
    layer = _Layer(HostGate(lambda h: h[..., :F].sigmoid() * h[..., F:]))
    first, *_, last = (layer.run(FEW_EXPERTS, 3) for _ in range(4))
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert _made(programs) == 1, "the sort alone"


def test_another_shape_is_another_program(programs: program.Programs) -> None:
    layer = _Layer(SwiGlu())
    for _ in range(3):
        for expert_TK in (FEW_EXPERTS, FEW_EXPERTS[:, :1], FEW_EXPERTS[:1], FEW_EXPERTS[:0]):
            assert all(torch.isfinite(t).all() for t in layer.run(expert_TK, 0))
    assert _made(programs) == 9, "three each, but no tokens have none: their tensors lie nowhere"


def test_a_retained_graph_can_be_walked_twice(programs: program.Programs) -> None:
    layer = _Layer(SwiGlu())
    for _ in range(3):
        torch.manual_seed(0)
        x = torch.randn(len(FEW_EXPERTS), D, device=DEVICE, dtype=DTYPES[0], requires_grad=True)
        weight = torch.rand(FEW_EXPERTS.shape, device=DEVICE)
        out = experts(
            x, layer.step.dispatch(FEW_EXPERTS.to(DEVICE)), weight, (layer.parts[0], layer.parts[1]), layer.step
        )
        dout = torch.randn_like(out)
        (first,) = torch.autograd.grad(out, x, dout, retain_graph=True)
        (second,) = torch.autograd.grad(out, x, dout)
        assert torch.equal(first, second)


def test_what_is_bound_is_run_until_it_can_be_repeated(programs: program.Programs, monkeypatch: Any) -> None:
    """With a sum to add to and without, and from where no kernel was compiled for."""

    def scaled(scale: float, tensors: Any) -> Any:
        x, total = tensors
        out = torch.empty_like(x) if total is None else total
        repack.repack([repack.Job(x, out, scale, adds=total is not None)])
        return (out if total is None else None,)

    x = torch.randn(6, 16, device=DEVICE)
    bound = program.Bound(programs, scaled, 2.0, (x,))
    runs: list[Any] = []
    run = bound._run
    monkeypatch.setattr(bound, "_run", lambda inputs: runs.append(inputs) or run(inputs))

    def check(total: Tensor) -> None:
        assert [*bound((total,))] == [None]
        assert torch.equal(total, 1 + 2 * x)

    for _ in range(5):
        (out,) = bound((None,))
        assert torch.equal(out, 2 * x)
        check(torch.ones_like(x))
    assert len(runs) == 2 + 2, "noted in the second of a kind"
    check(torch.ones(x.numel() + 1, device=DEVICE)[1:].view_as(x))
    assert len(runs) == 5


def test_what_cannot_be_repeated_is_asked_for_twice(programs: program.Programs, monkeypatch: Any) -> None:
    x = torch.randn(6, 16, device=DEVICE)
    bound = program.Bound(programs, lambda scale, tensors: (tensors[0] * scale,), 2.0, (x,))
    asked: list[Any] = []
    settled = bound._settled
    monkeypatch.setattr(bound, "_settled", lambda inputs: asked.append(inputs) or settled(inputs))
    for _ in range(5):
        (out,) = bound(())
        assert torch.equal(out, 2 * x)
    assert len(asked) == 2


def test_the_oldest_shapes_are_forgotten(programs: program.Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_MOST_PROGRAMS", 4)
    layer = _Layer(SwiGlu())
    for num_tokens in (2, 3, 4, 2):
        layer.run(FEW_EXPERTS[:num_tokens], 0)
    assert len(programs._known) == 4


def test_a_pass_runs_on_the_device_of_its_inputs(programs: program.Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, that are made up, with the other one current."""
    current = [0]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        outer, current[0] = current[0], device.index
        yield
        current[0] = outer

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    tensor: Any = SimpleNamespace(device=torch.device("cuda", 1), dtype=DTYPES[0], shape=(2,), stride=lambda: (1,))
    assert programs.run(lambda *_: (current[0],), None, (tensor,)) == (1,)  # type: ignore[arg-type,return-value]
    assert current == [0]
