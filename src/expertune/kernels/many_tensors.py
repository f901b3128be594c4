"""What a launch over many tensors reads of them: a table of addresses, and of each program which tensor is its own."""

from array import array
from collections.abc import Iterable
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def addresses_of(tensors: Iterable[Tensor]) -> array:  # type: ignore[type-arg]
    """Where each begins."""
    return array("q", map(Tensor.data_ptr, tensors))


def on_device(addresses: array, device: torch.device) -> Tensor:  # type: ignore[type-arg]
    """The table, int64, where a kernel reads it. Waits for nothing."""
    table = torch.frombuffer(addresses, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=64)
def tiles_of(numels: tuple[int, ...], numbers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tensors of so many numbers each, cut into tiles.

    Args:
        numels: of each tensor.
        numbers: of a tile.
        device: of both results.

    Returns:
        of each program the tensor and the tile within it, int32 `(tiles, 2)`; and `numels`, int64.
    """
    counts = torch.tensor([ceil_div(numel, numbers) for numel in numels])
    number = torch.arange(len(numels)).repeat_interleave(counts)
    tile = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    tiles = torch.stack((number, tile), dim=1).to(torch.int32)
    return tiles.to(device), torch.tensor(numels, dtype=torch.int64).to(device)
