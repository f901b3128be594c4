"""Configurations as data, the shapes that they are chosen for, and the one predicate of what a card can run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from expertune.kernels.device import ROWS

Architecture = tuple[int, int]
_Value = TypeVar("_Value")

# Shared memory that one program can have, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); the interpreter has no limit of its own.
_SHARED_KIB: dict[Architecture, int] = {
    (0, 0): 227,
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (9, 0): 227,
    (12, 0): 99,
}
_REGISTERS = 65536  # of a multiprocessor
_REGISTERS_A_THREAD = 256


@dataclass(frozen=True)
class LinearShape:
    """A grouped linear: the widths of its rows, the rank beside them, and which dimension of the weights is dense."""

    width_in: int
    width_out: int
    rank: int
    is_k_contiguous: bool

    def __str__(self) -> str:
        return f"{self.width_in}→{self.width_out} r{self.rank}" + (", K dense" if self.is_k_contiguous else "")


@dataclass(frozen=True)
class ShrinkShape:
    """A product with the narrow factor: width, rank, whether tokens are gathered, whether its rows are dense."""

    width: int
    rank: int
    is_gathered: bool
    is_k_contiguous: bool

    def __str__(self) -> str:
        notes = (", gathered" if self.is_gathered else "") + (", K dense" if self.is_k_contiguous else "")
        return f"{self.width}→r{self.rank}{notes}"


Shape = LinearShape | ShrinkShape


@dataclass(frozen=True)
class LinearConfig:
    """How a grouped linear is cut: columns and depth of a tile, warps and pipeline stages."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.columns}x{self.depth} {self.num_warps} warps {self.num_stages} stages"


@dataclass(frozen=True)
class ShrinkConfig:
    """How the product with a narrow factor is cut; a rank above `ranks` reads the rows again."""

    ranks: int
    depth: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.ranks}x{self.depth} {self.num_warps} warps {self.num_stages} stages"

    def block(self, rank: int) -> int:
        """Ranks a program."""
        return min(self.ranks, max(16, 1 << (rank - 1).bit_length()))


Config = LinearConfig | ShrinkConfig


def why_not(config: Config, shape: Shape, architecture: Architecture, itemsize: int) -> str | None:
    """In words why a card cannot run a configuration, or None if it can.

    The model: every stage holds both operands of a step in shared memory, the tile that is stored may take their place,
    and the sums take at most half of the registers; in float32 an eighth, because no matrix unit multiplies it exactly
    and the operands pass through registers too (more spills, as Triton 3.6 compiles it for 8.0 and 9.0).

    Args:
        config: how the kernel is cut.
        shape: what it is cut for.
        architecture: the card's, as `device.architecture` gives it.
        itemsize: bytes an element.
    """
    for name, value in asdict(config).items():
        least, most = {"num_warps": (1, 16), "num_stages": (1, 8)}.get(name, (16, 1024))
        if not least <= value <= most:
            return f"{name} must be from {least} to {most}, got {value}"
        if name != "num_stages" and value & (value - 1):
            return f"{name} must be a power of two, got {value}"
    columns = num_columns(config, shape)
    shared = max(config.num_stages * (ROWS + columns) * config.depth, ROWS * columns) * itemsize
    limit = newest(_SHARED_KIB, architecture) * 1024
    if shared > limit:
        return f"needs {shared / 1024:.0f} KiB of shared memory, the card has {limit // 1024}"
    threads = 32 * config.num_warps
    limit = min(_REGISTERS_A_THREAD, _REGISTERS // threads) // (8 if itemsize == torch.float32.itemsize else 2)
    if (sums := ROWS * columns // threads) > limit:
        return f"needs {sums} registers a thread for its sums, {limit} can be had"
    return None


def num_columns(config: Config, shape: Shape) -> int:
    """Columns of one step's product; its rows are those of `Tiles`."""
    return config.block(shape.rank) if isinstance(config, ShrinkConfig) else config.columns


def newest(table: Mapping[Architecture, _Value], architecture: Architecture) -> _Value:
    """The entry of the newest architecture that is not beyond the card's."""
    return table[max(known for known in table if known <= architecture)]
