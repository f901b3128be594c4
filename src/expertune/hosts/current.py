"""What a thread is in the middle of, for those that are called from within."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Current(threading.local, Generic[_Value]):
    """One thing in each thread; None where there is none."""

    value: _Value | None = None

    @contextmanager
    def being(self, value: _Value | None) -> Iterator[None]:
        """Around what is done meanwhile."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before


recording: Current[bool] = Current()  # whether a forward is recorded (`graphs/`)
