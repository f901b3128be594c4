"""Kernels compiled ahead: what a pass will launch, as far as that is known without its numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from expertune.kernels.ahead import compile_ahead
from expertune.kernels.launch import launch
from expertune.shapes import Tensors


class Kernel:
    """Notes what it is asked to do."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.num_runs = 0

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> None:
        tensors = tuple(tuple(a.shape) for a in arguments if isinstance(a, Tensor))
        self.compiled.append((tensors, arguments[len(tensors) :], grid, options))

    def __getitem__(self, grid: Any) -> Any:
        def run(*_arguments: Any, **_options: Any) -> None:
            self.num_runs += 1

        return run


def _pass(kernel: Any, inputs: Tensors) -> Tensors:
    (x,) = inputs
    assert x is not None
    out = x.new_empty((5, 2))
    launch(kernel, (7, 1, 1), (x, out.view(10)), (3,), (0.5,), {"BM": 16}, num_warps=8)
    total = out + 1  # needs numbers
    launch(kernel, (9, 1, 1), (total,), (), (), {})
    return (total,)


def test_launches_are_compiled_up_to_what_needs_numbers_and_none_is_made() -> None:
    kernel = Kernel()
    compile_ahead(_pass, kernel, (torch.zeros(4, 6),))
    assert kernel.compiled == [(((4, 6), (10,)), (3, 0.5), (7, 1, 1), {"BM": 16, "num_warps": 8})]
    assert kernel.num_runs == 0


def test_a_pass_is_compiled_ahead_once_for_any_number_of_tokens() -> None:
    kernel = Kernel()
    for num_tokens, width in ((4, 7), (5, 7), (4, 8)):
        compile_ahead(_pass, kernel, (torch.zeros(num_tokens, width, dtype=torch.float64),))
    assert [shapes[0] for shapes, *_ in kernel.compiled] == [(4, 7), (4, 8)]


def test_launches_are_made_again_afterwards() -> None:
    kernel = Kernel()
    compile_ahead(_pass, kernel, (torch.zeros(1, 9),))
    _pass(kernel, (torch.zeros(1, 9),))
    assert kernel.num_runs == 2
