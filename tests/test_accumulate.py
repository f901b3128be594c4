"""Gradients that the walk adds to `.grad` itself: the same sums as autograd's, and only where nobody could tell."""

import time
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune import accumulate
from expertune.activations import SwiGlu
from expertune.backends import native_torch
from expertune.backends.protocol import Backend
from expertune.experts import experts, run_backward
from expertune.shapes import ExpertsLayout, LoraFactors
from expertune.walk import ExpertsStep, Projection
from tests.cases import DEVICE, FEW_EXPERTS, NUM_FEW, is_interpreted, later, pair_id, runnable
from tests.numerics import assert_no_worse

WIDTH, INNER = 16, 24


class Block:
    """Experts whose weights and factors are all trained."""

    def __init__(
        self, backend: Backend, dtype: torch.dtype, *, ranks: tuple[int, ...] = (8,), transposed: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.parameters: dict[str, Tensor] = {}

        def parameter(name: str, *shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) / 4
            made = self.parameters[name] = drawn.to(DEVICE, dtype).requires_grad_()
            return made

        def projection(name: str, i: int, o: int) -> Projection:
            return Projection(
                weight=parameter(f"{name}.weight", NUM_FEW, *((i, o) if transposed else (o, i))),
                bias=parameter(f"{name}.bias", NUM_FEW, o),
                adapters=tuple(
                    LoraFactors(
                        a=parameter(f"{name}.a{n}", NUM_FEW * rank, i),
                        b=parameter(f"{name}.b{n}", o, rank * NUM_FEW),
                        scale=0.5,
                    )
                    for n, rank in enumerate(ranks)
                ),
            )

        self.projections = (projection("up", WIDTH, 2 * INNER), projection("down", INNER, WIDTH))
        layout = ExpertsLayout(
            num_experts=NUM_FEW, model_width=WIDTH, expert_width=INNER, has_gate=True, is_transposed=transposed,
            has_bias=True,
        )  # fmt: skip
        self.step = ExpertsStep(layout=layout, gate=SwiGlu(), backend=backend)

    def loss(self, seed: int) -> Tensor:
        """Of a batch of its own."""
        expert_TK = FEW_EXPERTS.to(DEVICE)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(FEW_EXPERTS), WIDTH, generator=generator, dtype=torch.float64)
        weight, dout = torch.rand(expert_TK.shape, generator=generator), torch.randn(x.shape, generator=generator)
        routing = self.step.dispatch(expert_TK)
        out = experts(x.to(DEVICE, self.dtype), routing, weight.to(DEVICE, self.dtype), self.projections, self.step)
        return (out * dout.to(DEVICE, self.dtype)).sum()

    def grads(self, seed: int) -> dict[str, Tensor]:
        """Handed out by autograd."""
        found = torch.autograd.grad(self.loss(seed), list(self.parameters.values()))
        return dict(zip(self.parameters, found, strict=True))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each backward how many gradients it was to add itself."""
    counts: list[int] = []
    real = accumulate._sums

    def counted(ctx: object, tensors: list[Tensor | None]) -> list[Tensor | None]:
        sums = real(ctx, tensors)
        counts.append(sum(total is not None for total in sums))
        return sums

    monkeypatch.setattr(accumulate, "_sums", counted)
    return counts


@pytest.mark.parametrize(
    ("backend", "dtype", "ranks", "transposed"),
    [
        # in the interpreter first each of the two layouts in one dtype
        pytest.param(
            *pair,
            *layout,
            marks=later(is_interpreted(pair[0]) and (pair[1] == torch.float32) is layout[1]),
            id="-".join(map(pair_id, (*pair, *layout))),
        )
        for pair in runnable(torch.float32, torch.bfloat16, torch.float16)
        for layout in (((8,), True), ((4, 9), False))
    ],
)
def test_later_batches_are_added_in_place(
    backend: Backend, dtype: torch.dtype, ranks: tuple[int, ...], transposed: bool, added: list[int]
) -> None:
    block = Block(backend, dtype, ranks=ranks, transposed=transposed)
    exact = Block(native_torch.BACKEND, torch.float64, ranks=ranks, transposed=transposed)
    for name, parameter in exact.parameters.items():
        parameter.data.copy_(block.parameters[name])
    seeds = range(4)  # what a pass launches is noted in the second of a kind, and repeated from the third on
    batches = [block.grads(seed) for seed in seeds]
    exact_batches = [exact.grads(seed) for seed in seeds]
    assert added == [0] * 8
    added.clear()
    for seed in seeds:
        block.loss(seed).backward()
    assert added == [0, *[len(block.parameters)] * 3]
    for name, parameter in block.parameters.items():
        plain, *more = [batch[name].clone() for batch in batches]
        for each in more:
            plain += each
        truth = torch.stack([batch[name] for batch in exact_batches]).sum(0)
        assert parameter.grad is not None
        assert_no_worse(parameter.grad, plain, truth, name)


def test_a_gradient_that_is_handed_out_is_not_added(added: list[int]) -> None:
    block = Block(native_torch.BACKEND, torch.float32, transposed=False)
    block.loss(0).backward()
    before = {name: p.grad.clone() for name, p in block.parameters.items()}
    block.grads(1)
    factor = block.parameters["up.a0"]
    block.loss(1).backward(inputs=[factor])
    assert added == [0, 0, 1]
    for name, parameter in block.parameters.items():
        assert torch.equal(parameter.grad, before[name]) is (parameter is not factor)


def test_hooks_see_what_is_added(added: list[int]) -> None:
    block = Block(native_torch.BACKEND, torch.float32, transposed=False)
    block.loss(0).backward()
    seen: list[Tensor] = []
    a, b = block.parameters["up.a0"], block.parameters["up.b0"]
    a.register_hook(seen.append)
    b.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    block.loss(1).backward()
    assert added == [0, len(block.parameters) - 2]
    expected = block.grads(1)
    assert any(torch.equal(each, expected["up.a0"]) for each in seen)
    assert any(torch.equal(each, b.grad) for each in seen)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_a_gradient_of_another_kind_is_left_to_autograd(added: list[int]) -> None:
    block = Block(native_torch.BACKEND, torch.float32, transposed=False)
    block.loss(0).backward()
    a, w = block.parameters["up.a0"], block.parameters["up.weight"]
    a.grad = a.grad.t().contiguous().t()
    w.grad = None
    block.loss(1).backward()
    assert added == [0, len(block.parameters) - 2]
    torch.testing.assert_close(w.grad, block.grads(1)["up.weight"])


def test_passes_of_several_threads_add_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU each runs in its caller's thread, and a sum in place is a read and a write."""
    block = Block(native_torch.BACKEND, torch.float64, ranks=(8,), transposed=False)
    for parameter in block.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    inside: list[int] = []
    seen: list[int] = []
    real = run_backward

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        time.sleep(0.05)
        seen.append(len(inside))
        grads = real(*args, **kwargs)
        inside.pop()
        return grads

    monkeypatch.setattr("expertune.experts.run_backward", slow)
    threads = [Thread(target=block.loss(seed).backward) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1]
