"""How a compiled kernel is found again: by all that it was compiled for, and by nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

LAUNCH: dict[str, Any] = {
    "grid": (2, 1, 1),
    "numbers": (64, 0.5),
    "constants": {"SLOTS": 3},
    "descriptors": (64,),  # rows of a tile
    "tensors": (torch.bfloat16, torch.float32),
    "num_warps": 4,
}
OTHERS = {
    "descriptors": (128,),
    "tensors": (torch.float16, torch.float32),
    "numbers": (128, 0.5),
    "constants": {"SLOTS": 5},
    "num_warps": 8,
}


class Kernel:
    """Triton's, as far as it is launched: counts what it compiles, and what of that runs again."""

    def __init__(self) -> None:
        self.num_compiled, self.ran = 0, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_run(*_arguments: Any, **_constants: Any) -> Any:
            self.num_compiled += 1
            return SimpleNamespace(function=None, packed_metadata=None, run=lambda *given: self.ran.append(given))

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    from expertune.kernels import launch as module

    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: 7, raising=False)
    return Kernel()


def launch(kernel: Kernel, address: int = 16, **others: Any) -> None:
    from expertune.kernels.launch import launch as ours

    given = LAUNCH | others
    device = SimpleNamespace(type="cuda", index=0)
    tensors = [SimpleNamespace(device=device, dtype=dtype, data_ptr=lambda: address) for dtype in given["tensors"]]
    tiles = [SimpleNamespace(base=tensors[0], block_shape=[rows, 64]) for rows in given["descriptors"]]
    ours(
        kernel,
        given["grid"],
        tuple(tensors),  # type: ignore[arg-type]
        (5,),
        given["numbers"],
        given["constants"],
        descriptors=tuple(tiles),
        num_warps=given["num_warps"],
    )


def test_it_runs_again_on_other_memory_and_another_grid(kernel: Kernel) -> None:
    launch(kernel)
    launch(kernel, address=48, grid=(3, 1, 1))
    assert kernel.num_compiled == 1
    ((*launched, _tile, first, second, size, width, scale, slots),) = kernel.ran
    assert launched[:4] == [3, 1, 1, 7]
    assert (first, second, size, width, scale, slots) == (48, 48, 5, 64, 0.5, 3)


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_found_by_all_that_it_was_compiled_for(kernel: Kernel, name: str) -> None:
    launch(kernel)
    launch(kernel, **{name: OTHERS[name]})
    assert (kernel.num_compiled, kernel.ran) == (2, [])


def test_another_kernel_is_another(kernel: Kernel) -> None:
    other = Kernel()
    launch(kernel)
    launch(other)
    assert (kernel.num_compiled, other.num_compiled) == (1, 1)
