"""What launchers ask of a device."""

from functools import lru_cache

import torch

ROWS = 128  # of a tile on a GPU

# In the CPU interpreter a persistent kernel gets few programs, so that each walks several tiles, and tiles are small.
_INTERPRETER_PROGRAMS = 4
_INTERPRETER_ROWS = 16


@lru_cache(maxsize=64)
def num_programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    """Whether the Hopper kernel runs there."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> tuple[int, int]:
    """What configurations are chosen by: the compute capability, or `(0, 0)` for the CPU interpreter."""
    if device.type != "cuda":
        return (0, 0)
    if torch.version.hip is not None:
        return (7, 5)  # AMD's cards have 64 KiB of shared memory, as Turing has
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def cache_bytes(device: torch.device) -> int:
    """Of a CUDA device's second-level cache, which all multiprocessors share."""
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def card_name(device: torch.device) -> str:
    """The card's name, as its driver gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU interpreter"


def tile_rows(device: torch.device) -> int:
    """Rows of a tile, the same for every grouped kernel of a layer."""
    return ROWS if device.type == "cuda" else _INTERPRETER_ROWS
