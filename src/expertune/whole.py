"""What the layers of a model share: copied when the model is, and not when one of its layers is copied alone."""

import copy
from typing import Any, TypeVar

from torch import nn

_Copied = TypeVar("_Copied")


class OfAModel:
    """An object that refers to all layers of a model, and is referred to by each."""

    whole: nn.Module | None = None
    """The model; None if it is copied with whatever refers to it."""

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether it belongs to what is being copied.

        Args:
            memo: of `copy.deepcopy`, in which a module stands before what it holds.
        """
        return self.whole is None or id(self.whole) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied(self, memo) if self.is_copied(memo) else self


def copied(x: _Copied, memo: dict[int, Any]) -> _Copied:
    """A deep copy of an object whose class says that it is copied in another way."""
    new = memo[id(x)] = object.__new__(type(x))
    state: Any = x.__reduce_ex__(4)[2]
    vars(new).update(copy.deepcopy(state, memo))
    return new
