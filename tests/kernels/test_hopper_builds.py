"""Hopper's kernels in Gluon, built for it on any machine: the installed Triton knows every name that they use."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter builds nothing, and takes functions as its own"
)

_SHARED_BYTES = 227 * 1024  # that a program may have on Hopper
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


def signature(argument: Any) -> str:
    """As Triton writes an argument's type."""
    if isinstance(argument, Tensor):
        return f"*{_NAMES[argument.dtype]}"
    if hasattr(argument, "block_shape"):
        return f"tensordesc<{_NAMES[argument.base.dtype]}{list(argument.block_shape)},{argument.layout!r}>"
    return "fp32" if isinstance(argument, float) else "i32"


def built(run: Callable[[], object]) -> list[Any]:
    """What of Gluon `run` launches, compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from expertune.kernels.launch import prepared

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with prepared(lambda *made: launches.append(made)):
        run()
    found = []
    for kernel, arguments, constants in launches:
        if not kernel.is_gluon():
            continue
        positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
        fixed = {name: value for name, value in constants.items() if name in positions}
        names = [name for name in kernel.arg_names if name not in fixed]
        types = dict(zip(names, map(signature, arguments), strict=True)) | dict.fromkeys(fixed, "constexpr")
        source = GluonASTSource(
            kernel,
            {name: types[name] for name in kernel.arg_names},
            {positions[name]: value for name, value in fixed.items()},
        )
        options = {name: value for name, value in constants.items() if name not in positions}
        found.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))
    return found


def check(run: Callable[[], object], number: int) -> None:
    kernels = built(run)
    assert len(kernels) == number
    for kernel in kernels:
        assert "wgmma.mma_async" in kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= _SHARED_BYTES


def heads(width: int, of_values: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, which two heads share, and two tensors like what comes out."""
    sizes = ((4, width), (2, width), (2, of_values), (4, of_values), (4, of_values))
    return tuple(torch.zeros(1, number, 200, size, dtype=torch.bfloat16) for number, size in sizes)


@pytest.mark.parametrize(("width", "of_values"), [(192, 128), (256, 256)])
def test_attention_s_backward(width: int, of_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward
    from expertune.kernels.attention_spans import Spans

    monkeypatch.setattr(backward, "is_hopper", lambda _: True)
    q, k, v, dout, out = heads(width, of_values)
    # both rounds, the second for keys and for queries
    given = (dout.transpose(1, 2), q, k, v, out.transpose(1, 2), q[..., 0].float(), 1.0)
    spans = Spans(200, *torch.zeros(2, 200, dtype=torch.int32))
    check(lambda: backward.backward(*given, spans), 3)


def test_attention_s_backward_with_scores_formed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import backward, backward_again
    from expertune.kernels.attention_spans import Spans

    monkeypatch.setattr(backward_again, "is_hopper", lambda _: True)
    monkeypatch.setattr(backward_again, "num_programs", lambda _: 1)
    q, k, v, dout, out = heads(128, 128)
    given = (dout.transpose(1, 2), q, k, v, out.transpose(1, 2), q[..., 0].float(), 1.0)
    spans = Spans(200, *torch.zeros(2, 200, dtype=torch.int32))
    check(lambda: backward.backward(*given, spans, forms_again=True), 2)


@pytest.mark.parametrize(("width", "of_values"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_attention_s_forward(width: int, of_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertune.attention import forward
    from expertune.kernels.attention_spans import Spans

    monkeypatch.setattr(forward, "is_hopper", lambda _: True)
    q, k, v, *_ = heads(width, of_values)
    spans = Spans(200, *torch.zeros(2, 200, dtype=torch.int32))
    check(lambda: forward.forward(q, k, v, 1.0, spans), 1)


@pytest.mark.parametrize("is_cooperative", [False, True], ids=["ping-pong", "cooperative"])
def test_linear(is_cooperative: bool) -> None:
    from expertune.kernels import gates, linear_hopper
    from expertune.shapes import Tiles

    x, w, mid = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((256, 64), (2, 128, 64), (256, 64)))
    counted = torch.zeros(4, dtype=torch.int32)
    tiles = Tiles(rows=128, expert=counted, row=counted, count=counted[:1], ends_E=counted[:2])
    gate = gates.GateKernel(*gates.SILU, is_concatenated=True)
    low_rank = {"mid_NR": mid, "b_ERO": torch.zeros(2, 128, 64, dtype=torch.bfloat16).mT}

    check(lambda: linear_hopper.linear(x, w.mT, tiles, **low_rank, gate=gate, is_cooperative=is_cooperative), 1)


def test_gate_s_backward() -> None:
    from expertune.kernels import gates, linear_hopper
    from expertune.shapes import Tiles

    dy, w, h = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((256, 64), (2, 64, 128), (256, 256)))
    counted = torch.zeros(256, dtype=torch.int32)
    tiles = Tiles(rows=128, expert=counted[:4], row=counted[:4], count=counted[:1], ends_E=counted[:2])
    gate = gates.GateKernel(*gates.SILU, is_concatenated=True)
    weight = torch.zeros(256, 1)

    check(lambda: linear_hopper.linear_gate_backward(dy, w, tiles, h, weight, counted, gate), 1)
