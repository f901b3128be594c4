"""A dense gated MLP as one node: the numbers of its definition, and half of what autograd keeps."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.activations import Gate, GeGlu, SwiGlu
from expertune.gated_mlp import gated_mlp
from expertune.shapes import LoraFactors
from expertune.split_linear import Linear
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.kept import kept_for_backward
from tests.numerics import assert_no_worse

WIDTH, INNER, RANK, SCALE = 24, 40, 8, 0.5
GATES: dict[Gate, Callable[[Tensor], Tensor]] = {
    SwiGlu(): F.silu,
    GeGlu("none"): F.gelu,
    GeGlu("tanh"): lambda x: F.gelu(x, approximate="tanh"),
}


def draw(dtype: torch.dtype, *, has_bias: bool, adapted: tuple[bool, bool, bool]) -> dict[str, Tensor]:
    """Tensors by name, in one order; factors want gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / 3).to(DEVICE, dtype)

    tensors = {"x": normal(3, 5, WIDTH).requires_grad_()}
    for name, i, o, has_adapter in zip("gud", (WIDTH, WIDTH, INNER), (INNER, INNER, WIDTH), adapted, strict=True):
        tensors[f"{name}.w"] = normal(o, i)
        if has_bias:
            tensors[f"{name}.bias"] = normal(o)
        if has_adapter:
            tensors |= {f"{name}.a": normal(RANK, i).requires_grad_(), f"{name}.b": normal(o, RANK).requires_grad_()}
    return tensors


def ours(tensors: dict[str, Tensor], gate: Gate, tile: int | None = None) -> Tensor:
    linears = []
    for name in "gud":
        a = tensors.get(f"{name}.a")
        adapter = None if a is None else LoraFactors(a=a, b=tensors[f"{name}.b"], scale=SCALE)
        linears.append(Linear(tensors[f"{name}.w"], tensors.get(f"{name}.bias"), adapter))
    return gated_mlp(tensors["x"], gate, tuple(linears), tile)


def plain(tensors: dict[str, Tensor], gate: Gate) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        y = F.linear(x, tensors[f"{name}.w"], tensors.get(f"{name}.bias"))
        if f"{name}.a" in tensors:
            y = y + F.linear(F.linear(x, tensors[f"{name}.a"]), tensors[f"{name}.b"]) * SCALE
        return y

    x = tensors["x"]
    return linear("d", GATES[gate](linear("g", x)) * linear("u", x))


def results(function: Callable[..., Tensor], tensors: dict[str, Tensor], gate: Gate) -> dict[str, Tensor]:
    y = function(tensors, gate)
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    dy = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).view(y.shape).to(y.dtype)
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))


ADAPTED = [(True, True, True), (True, False, False), (False, True, True), (False, False, False)]


@pytest.mark.parametrize("tile", [None, 15, 4])
@pytest.mark.parametrize("adapted", ADAPTED, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_float64_equals_the_definition(
    gate: Gate, has_bias: bool, adapted: tuple[bool, bool, bool], tile: int | None
) -> None:
    """In tiles of 4, 4, 4 and 3 tokens too."""
    tensors = draw(torch.float64, has_bias=has_bias, adapted=adapted)
    got, expected = results(partial(ours, tile=tile), tensors, gate), results(plain, tensors, gate)
    assert list(got) == list(expected)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_no_worse_than_torch(gate: Gate, dtype: torch.dtype, tile: int | None) -> None:
    tensors = draw(dtype, has_bias=True, adapted=ADAPTED[0])
    exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    got, other = results(partial(ours, tile=tile), tensors, gate), results(plain, tensors, gate)
    truth = results(plain, exact, gate)
    for name in got:
        assert got[name].dtype == dtype
        assert_no_worse(got[name], other[name], truth[name], name)


def test_gradients_where_they_are_wanted() -> None:
    tensors = draw(torch.float64, has_bias=False, adapted=ADAPTED[0])
    tensors["x"].requires_grad_(False)
    tensors["u.a"].requires_grad_(False)
    ours(tensors, SwiGlu()).sum().backward()
    given = {name for name, tensor in tensors.items() if tensor.grad is not None}
    assert given == {"g.a", "g.b", "u.b", "d.a", "d.b"}


@pytest.mark.parametrize("tile", [None, 4])
def test_backward_twice(tile: int | None) -> None:
    tensors = draw(torch.float64, has_bias=False, adapted=ADAPTED[0])
    y = ours(tensors, SwiGlu(), tile).sum()
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, wanted), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("tile", "kept"), [(None, 2 * INNER + 3 * RANK), (4, 0)])
def test_saved_for_backward(tile: int | None, kept: int) -> None:
    tensors = draw(torch.bfloat16, has_bias=False, adapted=ADAPTED[0])
    with kept_for_backward() as storages:
        ours(tensors, SwiGlu(), tile)
    num_tokens = 3 * 5
    read = sum(tensor.numel() for tensor in tensors.values())
    assert sum(storages.values()) == 2 * (read + num_tokens * kept)


@needs_kernels
@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_of_the_gates_backward(dtype: torch.dtype, gate: Gate, width: int, overwrites: bool) -> None:
    from expertune.backends.triton_steps import gate_kernel
    from expertune.kernels.gates import plain_gate_backward

    generator = torch.Generator().manual_seed(0)
    h, da = (torch.randn(7, n, generator=generator).to(DEVICE, dtype) for n in (2 * width, width))
    truths, others = gate.backward(h.double(), da.double()), gate.backward(h.clone(), da.clone())
    kernel = gate_kernel(gate)
    assert kernel is not None
    kept = h.clone()
    got = plain_gate_backward(h, da, kernel, overwrites=overwrites)
    assert (got[1].data_ptr() == h.data_ptr()) is overwrites
    assert overwrites or torch.equal(h, kept)
    for name, mine, other, truth in zip(("a", "dh"), got, others, truths, strict=True):
        assert_no_worse(mine, other, truth, name)
