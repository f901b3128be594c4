"""What the recordings of a model on one device share: tensors that all layers get, buffers, memory, and its limit."""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from expertune.graphs.capture import Capture
from expertune.memory.meter import Meter

_PART = 2  # recordings take at most such a part of the memory that would be free without them
_IDLE = 1 / 20  # of what tensors take: memory beyond that is not left idle where recorded work wants more


class User(Protocol):
    """A recording."""

    number: int

    @property
    def is_pending(self) -> bool:
        """Whether a backward is to come."""
        ...


class Shared:
    """A tensor without gradient that several recordings read, such as the angles of rotary embeddings.

    Args:
        x: what it holds first.
    """

    def __init__(self, x: Tensor) -> None:
        self.tensor = x.detach().clone()
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self._note(x)

    def holds(self, x: Tensor) -> bool:
        """Whether it has the values of this very tensor."""
        return self._source() is x and self._version == x._version

    def takes(self, x: Tensor, begun: Sequence[User]) -> bool:
        """Whether it can be given the values of `x`: not while a backward is to come that reads others.

        Args:
            x: a tensor.
            begun: among which is every recording whose backward is to come.
        """
        return self.holds(x) or not any(user in self.users and user.is_pending for user in begun)

    def load(self, x: Tensor) -> None:
        """Copy, unless that was done for another layer."""
        if not self.holds(x):
            self.tensor.copy_(x)
            self._note(x)

    def _note(self, x: Tensor) -> None:
        self._source, self._version = weakref.ref(x), x._version


class Pool:
    """Shared by the recordings of a model on one device.

    Args:
        capture: how work is recorded.
        meter: the memory of the device; None where nobody counts.
    """

    def __init__(self, capture: Capture, meter: Meter | None = None) -> None:
        self.capture = capture
        self._meter = meter
        # those that are loaded before each replay apart; they live while a recording reads them
        self._shared: dict[bool, weakref.WeakSet[Shared]] = {False: weakref.WeakSet(), True: weakref.WeakSet()}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._sizes: weakref.WeakKeyDictionary[User, int] = weakref.WeakKeyDictionary()  # bytes that each took
        self._numbers = 0
        self._begun: list[User] = []  # ascending

    def has_room(self, rest: float) -> bool:
        """Whether one more recording, as large as the largest so far, leaves enough memory for all else.

        Args:
            rest: the bytes that a step takes beside what its layers keep, as far as they are known.
        """
        if self._meter is None:
            return True
        held, largest, free = self._held(), max(self._sizes.values(), default=0), self._meter.free()
        return largest + rest <= free and _PART * (held + largest) <= held + free

    def is_short(self, rest: float) -> bool:
        """Whether a step that recordings do not serve may want what they hold.

        Args:
            rest: as for `has_room`; where it is not known, such a step takes about as much as recordings hold.
        """
        return self._meter is not None and self._meter.free() < (rest or self._held())

    def _held(self) -> int:
        return sum(self._sizes.values())

    def next_number(self) -> int:
        """Of a recording, in the order in which they are made."""
        self._numbers += 1
        return self._numbers

    def note_size(self, user: User, before: int) -> None:
        """A recording was made; `before` it so many bytes were allocated."""
        if self._meter is not None:
            self._sizes[user] = self._meter.allocated() - before

    def allocated(self) -> int:
        """Bytes, now."""
        return 0 if self._meter is None else self._meter.allocated()

    def may_begin(self, user: User, shared: Sequence[tuple[Shared, Tensor]]) -> bool:
        """Whether a forward can be replayed now, on these values of what it shares.

        It cannot while its own backward is to come, or one of a recording that was made later and may keep what lies
        where this one writes in passing, or one that reads other values.
        """
        while self._begun and not self._begun[-1].is_pending:
            self._begun.pop()
        if self._begun and self._begun[-1].number >= user.number:
            return False
        return all(each.takes(x, self._begun) for each, x in shared)

    def begin(self, user: User) -> None:
        """A forward is replayed."""
        self._begun.append(user)

    def make_room(self) -> None:
        """Give back what a layer's runs have left before it is recorded, if that is much: a recording cannot use it."""
        if self._meter is not None and self._meter.idle_part() > _IDLE:
            self.capture.make_room()

    def shared(self, x: Tensor, *, is_passing: bool = False) -> Shared:
        """A copy of `x` for recordings to read: the one that holds it already, if there is one.

        Args:
            x: a tensor without gradient.
            is_passing: whether its readers load it before each replay, so that it may be written to between.
        """
        alike = self._shared[is_passing]
        shared = next((each for each in alike if each.holds(x)), None) or Shared(x)
        alike.add(shared)
        return shared

    def buffer(self, purpose: str, numel: int, like: Tensor) -> Tensor:
        """A flat buffer through which values enter or leave a graph, the same memory for all recordings.

        Args:
            purpose: buffers of different purposes are used at the same time.
            numel: its size.
            like: has its dtype and device.
        """
        key = (purpose, like.dtype)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = like.new_empty(numel)  # a smaller one lives on in the recordings that use it
        return self._buffers[key][:numel]
