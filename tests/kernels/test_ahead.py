"""Kernels built ahead: what a pass and its backward will launch, and nothing is run."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime._async_compile import active_mode

from expertune.activations import ClampedSwiGlu, Gate, HostGate, SwiGlu
from expertune.backends import triton_steps
from expertune.experts import _forward
from expertune.kernels import launch, program
from expertune.kernels.ahead import compile_ahead, run_without_numbers
from expertune.shapes import Pass, Tensors
from tests.cases import FEW_EXPERTS
from tests.kernels.test_program import DTYPES, F, _Layer

CPU = torch.device("cpu")


class Kernel:
    """Notes what it is asked to do; what it compiles to is `built`, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.__name__ = "_some_kernel"
        self.error = error
        self.warmed: list[tuple[Any, ...]] = []
        self.num_compiled = self.num_loaded = self.num_runs = 0

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> None:  # noqa: ARG002
        tensors = tuple(tuple(a.shape) for a in arguments if isinstance(a, Tensor))
        call = (tensors, arguments[len(tensors) :], options)
        if call not in self.warmed:
            self.warmed.append(call)
            mode = active_mode.get()
            assert mode is not None
            mode.executor.submit(self._compile)  # type: ignore[arg-type]

    def _compile(self) -> "Kernel":
        if self.error is not None:
            raise self.error
        self.num_compiled += 1
        return self

    @property
    def run(self) -> None:
        self.num_loaded += 1

    def __getitem__(self, grid: Any) -> Any:
        def run(*_arguments: Any, **_options: Any) -> None:
            self.num_runs += 1

        return run


def _pass(kernel: Any, inputs: Tensors) -> Tensors:
    (x,) = inputs
    assert x is not None
    out = x.new_empty((5, 2))
    launch.launch(kernel, (7, 1, 1), (x, out.view(10)), (3,), (0.5,), {"BM": 16}, num_warps=8)
    total = torch.cat([out[:2] + 1, x.new_ones((1, 2))]).mul_(out[:1])
    launch.launch(kernel, (9, 1, 1), (total, x.index_select(0, out[:, 0].long())), (), (), {})
    if out.sum().item() > 0:
        raise AssertionError("numbers that were never written")
    launch.launch(kernel, (1, 1, 1), (out,), (), (), {"BM": 4})
    return (total,)


def test_launches_are_built_up_to_what_needs_numbers_and_none_is_made() -> None:
    kernel, x = Kernel(), torch.ones(4, 6)
    compile_ahead(_pass, kernel, (x,), CPU)
    assert kernel.warmed == [
        (((4, 6), (10,)), (3, 0.5), {"BM": 16, "num_warps": 8}),
        (((3, 2), (5, 6)), (), {}),
    ]
    assert kernel.num_compiled == kernel.num_loaded == 2
    assert kernel.num_runs == 0
    assert (x == 1).all()


def test_launches_are_made_again_afterwards() -> None:
    def twice(kernel: Any, inputs: Tensors) -> Tensors:
        for _ in range(2):
            launch.launch(kernel, (1, 1, 1), (inputs[0],), (), (), {})  # type: ignore[arg-type]
        return ()

    kernel = Kernel()
    compile_ahead(twice, kernel, (torch.ones(2),), CPU)
    assert kernel.num_compiled == 1, "a kernel that is known is not built again"
    twice(kernel, (torch.ones(2),))
    assert kernel.num_runs == 2


@pytest.mark.parametrize("bring", [Tensor.nonzero, Tensor.cpu, Tensor.tolist], ids=["nonzero", "cpu", "tolist"])
def test_numbers_end_it(bring: Any) -> None:
    """On a device other than the host's, which is made up: copying from it would wait for it."""
    ended: list[str] = []

    def needs(_static: Any, inputs: Tensors) -> Tensors:
        x = inputs[0]
        assert x is not None
        bring(x + 1)
        ended.append("went on")
        return ()

    run_without_numbers(needs, None, (torch.ones(3, device="meta"),), lambda *_: None)
    assert not ended


def test_a_kernel_that_fails_is_named() -> None:
    kernel = Kernel(ValueError("bad layout"))
    with pytest.raises(RuntimeError, match="kernel _some_kernel could not be built: bad layout"):
        compile_ahead(_pass, kernel, (torch.ones(4, 6),), CPU)
    assert active_mode.get() is None


def test_what_a_pass_makes_of_no_tensor_has_its_numbers() -> None:
    """A launcher may keep it."""
    kept: list[Tensor] = []

    def keeps(_static: Any, _inputs: Tensors) -> Tensors:
        kept.append(torch.arange(3))
        return ()

    run_without_numbers(keeps, None, (torch.ones(1),), lambda *_: None)
    assert kept[0].tolist() == [0, 1, 2]


LAYERS: dict[str, Any] = {
    "silu": (SwiGlu(), {}),
    "no adapter": (SwiGlu(), {"ranks": ()}),
    "two adapters": (SwiGlu(), {"ranks": (8, 16)}),
    "clamped, biases, transposed": (ClampedSwiGlu(1.702, 7.0), {"has_bias": True, "is_transposed": True}),
    "a gate of the host": (HostGate(lambda h: h[..., :F].sigmoid() * h[..., F:]), {}),
}


@pytest.mark.skipif(not DTYPES, reason="needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter")
@pytest.mark.parametrize(("gate", "options"), LAYERS.values(), ids=LAYERS)
def test_what_is_built_is_what_both_passes_launch(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, options: dict[str, Any]
) -> None:
    prepared: set[Any] = set()
    launched: set[Any] = set()

    def prepare(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        tensors = [getattr(a, "base", a) for a in arguments]  # of a descriptor, the tensor it describes
        dtypes = [a.dtype for a in tensors if isinstance(a, Tensor)]
        values = [a for a in arguments if isinstance(a, int | float)]
        prepared.add((kernel, *dtypes, *values, *constants.values()))

    def note(made: launch.Launch, tensors: Any) -> None:
        launched.add((made.kernel, *[t.dtype for t in tensors], *made.values, *made.options.values()))

    class Watched(program.Programs):
        def run(self, function: Pass, static: Any, inputs: Tensors, ahead: Pass | None = None) -> Tensors:
            if function is _forward:
                assert ahead is not None
                run_without_numbers(ahead, static, inputs, prepare)
            if function is triton_steps._sort:
                return function(static, inputs)
            with launch.watched(note):
                return function(static, inputs)

    monkeypatch.setattr(triton_steps, "_programs", Watched())
    results = _Layer(gate, **options).run(FEW_EXPERTS, 0)
    assert all(torch.isfinite(result).all() for result in results)
    assert len(launched) >= 4
    assert prepared == launched


def test_kernels_are_built_once_for_all_layers_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(program, "compile_ahead", lambda function, *_: built.append(function))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    programs = program.Programs()

    def made_up(*shape: int) -> Any:
        class Made:
            dtype, device, stride = torch.float16, torch.device("cuda", 0), lambda _: (shape[-1], 1)

        Made.shape = shape  # type: ignore[attr-defined]
        return Made()

    def forward(_static: Any, _inputs: Tensors) -> Tensors:
        return ()

    def both(_static: Any, _inputs: Tensors) -> Tensors:
        raise AssertionError("never run")

    for layer, num_tokens in ((0, 4), (1, 4), (0, 5)):
        programs.run(forward, layer, (made_up(num_tokens, 8),), both)
    programs.run(forward, 0, (made_up(4, 16),))
    programs.run(forward, 0, (torch.ones(4, 16),))
    assert built == [both, forward]
