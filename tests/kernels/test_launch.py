"""How a compiled kernel is found again: by all that it was compiled for, and by nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


def key(**others: Any) -> tuple[Any, ...]:
    from expertune.kernels.launch import key_of

    rows = torch.empty(256, 64, dtype=torch.bfloat16)
    tiles = SimpleNamespace(base=rows, block_shape=[64, 64])
    kernel, constants, options = test_it_is_found_by_all_that_it_was_compiled_for, {"SLOTS": 3}, {"num_warps": 4}
    given = {"kernel": kernel, "descriptors": (tiles,), "tensors": (rows, torch.empty(8)), "numbers": (64, 0.5)}
    return key_of(**(given | {"constants": constants, "options": options} | others))


OTHERS = {
    "kernel": key,
    "descriptors": (SimpleNamespace(base=torch.empty(256, 64, dtype=torch.bfloat16), block_shape=[128, 64]),),
    "tensors": (torch.empty(256, 64, dtype=torch.float16), torch.empty(8)),
    "numbers": (128, 0.5),
    "constants": {"SLOTS": 5},
    "options": {"num_warps": 8},
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_found_by_all_that_it_was_compiled_for(name: str) -> None:
    assert key() == key()  # other memory
    assert key(**{name: OTHERS[name]}) != key()
