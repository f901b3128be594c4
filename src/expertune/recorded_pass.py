"""Passes that are being recorded, each known by leaves that nobody else has.

A pass of another model, or of another thread, may run meanwhile; and autograd runs a backward in a thread of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor


class RecordedPass:
    """A forward or a backward that is recorded.

    Args:
        leaves: nobody else's.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = frozenset(map(id, leaves))

    def covers(self, leaves: Sequence[Tensor | None]) -> bool:
        """Whether there are any, and all are its own."""
        return bool(leaves) and self._leaves.issuperset(map(id, leaves))


_Pass = TypeVar("_Pass", bound=RecordedPass)


class Running(Generic[_Pass]):
    """Those of one kind that run now."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []

    @contextmanager
    def during(self, each: _Pass) -> Iterator[None]:
        """Around a run of a pass."""
        self._passes.append(each)
        try:
            yield
        finally:
            self._passes.remove(each)

    def of(self, leaves: Sequence[Tensor | None]) -> _Pass | None:
        """The one that covers all of these; None if there is none."""
        return next((each for each in self._passes if each.covers(leaves)), None)
