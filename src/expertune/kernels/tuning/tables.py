"""The configurations that are shipped, and those that a search tries. To tune another kernel, add it to `OPERATIONS`.

Per architecture a list, best first: the first is taken that fits the dtype and the rank, and is meant for so many rows.
In 16 bits 9.0 was measured (shrinks on an H200, linears on an H100); the others are the largest that fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from expertune.kernels.tuning.configs import (
    Architecture,
    Config,
    LinearConfig,
    LinearShape,
    Shape,
    ShrinkConfig,
    ShrinkShape,
    newest,
    num_columns,
    why_not,
)

_MAX_CANDIDATES = 12
_FLOAT32 = LinearConfig(64, 32, 8, 3)
_SMALL_SHRINKS = (ShrinkConfig(128, 32, 4, 3), ShrinkConfig(64, 32, 8, 2))


@dataclass(frozen=True)
class Shipped:
    """An entry of a table.

    Args:
        config: the configuration.
        rows: an expert, on average, from which on it is meant.
        only_gathers: whether it is meant for gathering alone.
    """

    config: Config
    rows: int = 0
    only_gathers: bool = False

    def is_meant(self, shape: Shape, rows: int) -> bool:
        """Whether for this shape and so many rows an expert."""
        gathers = isinstance(shape, ShrinkShape) and shape.is_gathered
        return rows >= self.rows and (gathers or not self.only_gathers)


def _always(*configs: Config) -> tuple[Shipped, ...]:
    return tuple(map(Shipped, configs))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A kernel whose cut is chosen.

    Args:
        kernel: name of its file in `kernels/`.
        config: class of its configurations.
        shipped: per architecture, best first.
        candidates: per architecture, in the order in which a search tries them.
    """

    kernel: str
    config: type[Config]
    shipped: Mapping[Architecture, tuple[Shipped, ...]]
    candidates: Mapping[Architecture, tuple[Config, ...]]


OPERATIONS: dict[type[Shape], Operation] = {
    LinearShape: Operation(
        kernel="linear",
        config=LinearConfig,
        shipped={
            (0, 0): _always(LinearConfig(32, 16, 4, 2)),
            (7, 5): _always(LinearConfig(64, 32, 4, 2), LinearConfig(64, 32, 8, 2)),
            (8, 0): _always(LinearConfig(256, 64, 8, 3), _FLOAT32),
            (8, 6): _always(LinearConfig(128, 64, 8, 3), _FLOAT32),
            (9, 0): _always(LinearConfig(256, 64, 8, 4), _FLOAT32),
            (12, 0): _always(LinearConfig(128, 64, 8, 3), _FLOAT32),
        },
        candidates={
            (0, 0): (LinearConfig(16, 16, 4, 2), LinearConfig(32, 32, 4, 2)),
            (7, 5): (
                LinearConfig(256, 64, 8, 4),
                LinearConfig(256, 64, 8, 3),
                LinearConfig(256, 64, 8, 2),
                LinearConfig(256, 32, 8, 4),
                LinearConfig(256, 32, 8, 3),
                LinearConfig(128, 64, 8, 4),
                LinearConfig(128, 64, 8, 3),
                LinearConfig(128, 64, 4, 4),
                LinearConfig(128, 64, 4, 3),
                LinearConfig(128, 32, 4, 4),
                LinearConfig(128, 128, 8, 3),
                LinearConfig(64, 64, 4, 4),
                LinearConfig(64, 64, 4, 3),
                LinearConfig(128, 32, 8, 2),
                LinearConfig(64, 32, 4, 3),
                LinearConfig(64, 32, 4, 2),
                LinearConfig(32, 32, 4, 3),
            ),
        },
    ),
    ShrinkShape: Operation(
        kernel="shrink",
        config=ShrinkConfig,
        shipped={
            (0, 0): _always(ShrinkConfig(128, 64, 4, 3), *_SMALL_SHRINKS),
            (9, 0): (
                Shipped(ShrinkConfig(128, 128, 4, 3), rows=1024, only_gathers=True),
                Shipped(ShrinkConfig(128, 64, 4, 3), rows=256),
                *_always(ShrinkConfig(128, 128, 8, 3), *_SMALL_SHRINKS),
            ),
            (10, 0): _always(ShrinkConfig(128, 64, 4, 3), *_SMALL_SHRINKS),
        },
        candidates={
            (0, 0): (ShrinkConfig(64, 32, 4, 2), ShrinkConfig(16, 64, 4, 2)),
            (7, 5): (
                ShrinkConfig(128, 64, 4, 3),
                ShrinkConfig(128, 64, 8, 3),
                ShrinkConfig(128, 64, 8, 2),
                ShrinkConfig(128, 64, 4, 4),
                ShrinkConfig(128, 64, 8, 4),
                ShrinkConfig(128, 64, 4, 2),
                ShrinkConfig(128, 128, 4, 2),
                ShrinkConfig(128, 128, 8, 2),
                ShrinkConfig(128, 128, 4, 3),
                ShrinkConfig(128, 128, 8, 3),
                ShrinkConfig(128, 32, 4, 4),
                ShrinkConfig(128, 32, 8, 4),
                ShrinkConfig(128, 32, 4, 3),
                ShrinkConfig(64, 32, 8, 3),
                ShrinkConfig(64, 32, 8, 2),
                ShrinkConfig(64, 16, 8, 3),
            ),
        },
    ),
}


def shipped(shape: Shape, architecture: Architecture, itemsize: int, rows: int) -> Config:
    """The configuration of the tables.

    Args:
        shape, architecture, itemsize: as for `why_not`.
        rows: an expert, on average.
    """
    for entry in newest(OPERATIONS[type(shape)].shipped, architecture):
        if entry.is_meant(shape, rows) and why_not(entry.config, shape, architecture, itemsize) is None:
            return entry.config
    raise LookupError(f"no shipped configuration fits {shape} on {architecture}")


def candidates(shape: Shape, architecture: Architecture, itemsize: int, current: Config) -> list[Config]:
    """What a search tries, `current` first. Those that come down to the same tile are tried once."""
    tried: dict[tuple[object, ...], Config] = {}
    for config in (current, *newest(OPERATIONS[type(shape)].candidates, architecture)):
        if why_not(config, shape, architecture, itemsize) is None:
            tried.setdefault((num_columns(config, shape), config.depth, config.num_warps, config.num_stages), config)
    return list(tried.values())[:_MAX_CANDIDATES]
