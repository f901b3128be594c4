"""Prepare: what a recorded forward pass reads of parameters alone, computed before the layers run.

A step begins with milliseconds of Python, masks and angles, in which the device waits. Adapters' factors are cast and
packed then, those of all layers, and not by each layer when its turn comes. The counterpart of the gradients that a
recorded pass leaves for later (`accumulate.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from expertune.recorded_pass import RecordedPass, Running
from expertune.shapes import Tensors


class Preparation(RecordedPass):
    """Of one forward pass that is recorded: run as it is, once or more, then computed by `run`, then run again.

    What is computed of the leaves that it covers may be computed beforehand.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__(leaves)
        self._makes: list[Callable[[], Tensors]] = []
        self._read: dict[int, Tensor] = {}  # the leaves from which it is made
        self._made: list[Tensors] | None = None
        self._place = 0  # in a run of the pass

    def __bool__(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._makes)

    def made(self, leaves: Sequence[Tensor | None], make: Callable[[], Tensors]) -> Tensors:
        """What `make` yields: by calling it, or what `run` has made of it.

        Args:
            leaves: which `covers`.
            make: of these alone; what it yields is read only.
        """
        self._place += 1
        if self._made is not None:
            return self._made[self._place - 1]
        self._makes.append(make)
        self._read |= {id(leaf): leaf for leaf in leaves if leaf is not None}
        return make()

    def versions(self) -> list[int]:
        """Of the leaves from which it is made, other ones once one has been written to."""
        return [leaf._version for leaf in self._read.values()]

    def run(self) -> None:
        """Make all, in the order in which the last run asked for it; later runs of the pass read this."""
        with torch.no_grad():
            self._made = [make() for make in self._makes]

    @contextmanager
    def during(self) -> Iterator[None]:
        """Around each run of the pass."""
        self._place = 0
        if self._made is None:
            self._makes.clear()
            self._read.clear()
        with _running.during(self):
            yield


_running: Running[Preparation] = Running()


def preparation_of(leaves: Sequence[Tensor | None]) -> Preparation | None:
    """By which what is computed of these alone may be made beforehand; None if it is wanted now."""
    return None if torch.compiler.is_compiling() else _running.of(leaves)


def cast(factors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensors:
    """Factors in the dtype that they are multiplied in, perhaps made beforehand; None for None."""
    leaves = [factor for factor in factors if factor is not None]
    if all(leaf.dtype == dtype for leaf in leaves):
        return _cast(factors, dtype)
    return _beforehand(leaves, partial(_cast, factors, dtype))


def joined(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> Tensors:
    """The factors `(R, I)` of several adapters one below the other, then each of theirs `(O, R)`, all as in `cast`."""
    if len(a) == 1:
        return cast([*a, *b], dtype)
    return _beforehand([*a, *b], partial(_joined, a, b, dtype))


def _beforehand(leaves: Sequence[Tensor], make: Callable[[], Tensors]) -> Tensors:
    """What `make` yields of these alone, made beforehand where that may be."""
    preparation = preparation_of(leaves)
    return make() if preparation is None else preparation.made(leaves, make)


def _joined(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> Tensors:
    all_RI = a[0].new_empty((sum(map(len, a)), a[0].shape[1]), dtype=dtype)
    for part_RI, a_RI in zip(torch.split(all_RI, [*map(len, a)]), a, strict=True):
        part_RI.copy_(a_RI)
    return [all_RI, *_cast(b, dtype)]


def _cast(factors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensors:
    return [None if factor is None else factor.to(dtype) for factor in factors]
