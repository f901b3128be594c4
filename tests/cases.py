"""Routings that break kernels, by name, and the backends and dtypes that can run on this machine.

Triton's kernels run on a GPU, or on a CPU in its interpreter: `TRITON_INTERPRET=1 pytest`.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.backends import PREFERRED, triton
from expertune.backends.protocol import Backend
from expertune.shapes import Problem

NUM_EXPERTS = 6


def _random(num_tokens: int, top_k: int, experts: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 31 + top_k)
    scores = torch.rand(num_tokens, len(experts), generator=generator)
    return torch.tensor(experts)[scores.topk(top_k, dim=-1).indices]


ROUTINGS: dict[str, Tensor] = {
    "even": _random(19, 2, list(range(NUM_EXPERTS))),
    "empty experts": _random(19, 2, [1, 4]),
    "one hot expert": torch.cat([_random(4, 2, list(range(NUM_EXPERTS))), torch.tensor([[3, 0]]).repeat(15, 1)]),
    "all tokens on one": torch.full((17, 1), 5),
    "one token": torch.tensor([[4, 2]]),
    "zero tokens": torch.empty(0, 2, dtype=torch.long),
    "top-1": _random(13, 1, list(range(NUM_EXPERTS))),
    "every expert": torch.arange(NUM_EXPERTS).repeat(5, 1),
}

# for tests whose passes are many: in the interpreter each takes seconds
NUM_FEW = 3
FEW_EXPERTS = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0], [0, 2]])

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float32 on this machine's device, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problem(dtype: torch.dtype, *widths: int) -> Problem:
    """A product of these widths on this machine."""
    capability = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
    return Problem(device=DEVICE.type, capability=capability, dtype=dtype, widths=widths)


def runnable(*dtypes: torch.dtype) -> list[tuple[Backend, torch.dtype]]:
    """Every backend with each of the dtypes in which it can run here."""
    return [(b, dtype) for b in PREFERRED for dtype in dtypes if b.why_not(problem(dtype, 16)) is None]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# in which Triton's kernels run here, and the mark of tests of them
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_DTYPES = [dtype for dtype in _KERNEL_DTYPES if triton.BACKEND.why_not(problem(dtype, 16)) is None]
needs_kernels = pytest.mark.skipif(
    not KERNEL_DTYPES, reason="needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter"
)


def is_interpreted(backend: Backend) -> bool:
    """Whether it runs in Triton's interpreter, where a pass takes seconds."""
    return backend.name == "triton" and DEVICE.type == "cpu"


def later(is_later: bool) -> Any:
    """The marks of a case that waits, in the interpreter, for `make test-thorough`."""
    return pytest.mark.thorough if is_later and DEVICE.type == "cpu" and KERNEL_DTYPES else ()


def crossed(values: Iterable[Any], usual: Any, routings: tuple[str, ...] = ("one hot expert",)) -> list[Any]:
    """Every value with every routing; in the interpreter first every value with these, every routing with the usual.

    For values that change what a program does with rows, and no row's place.
    """
    return [
        pytest.param(
            routing,
            value,
            marks=later(value != usual and name not in routings),
            id=f"{name}-{value}",
        )
        for name, routing in ROUTINGS.items()
        for value in values
    ]


def pair_id(value: object) -> str:
    """How pytest names a backend or a dtype."""
    return value.name if isinstance(value, Backend) else str(value).removeprefix("torch.")
