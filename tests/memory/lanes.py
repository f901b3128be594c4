"""A lane on the CPU whose copies end as late as they may, or at once, and which notices what was let go too early."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Place(NamedTuple):
    """Where a tensor lies, without holding it."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> "_Place":
        return cls(StorageWeakRef(x.untyped_storage()), x.dtype, x.shape, x.stride(), x.storage_offset())

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "freed before its copy was waited for"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


class Lane:
    """Copies in order. A late one is done when it is waited for; until then its target is not a number.

    Args:
        is_late: whether copies are late.
        most_buffers: that the host has memory for.
    """

    def __init__(self, is_late: bool = True, most_buffers: int | None = None) -> None:
        self.num_buffers = 0
        self._most_buffers = most_buffers
        self.bytes_taken = 0
        self.bytes_moved: list[int] = []
        self._is_late = is_late
        self._copies: list[tuple[_Place, _Place]] = []
        self._num_done = 0
        self._brought: list[StorageWeakRef] = []
        self._buffers: set[int] = set()

    @property
    def num_brought(self) -> int:
        """How many of the tensors that were brought back are alive."""
        return len({storage for storage in self._brought if not storage.expired()})

    def buffer(self, num_bytes: int) -> Tensor | None:
        if self.num_buffers == self._most_buffers:
            return None
        self.num_buffers += 1
        self.bytes_taken += num_bytes
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._buffers.add(buffer.data_ptr())
        return buffer

    def copy(self, source: Tensor, target: Tensor) -> int:
        self._copies.append((_Place.of(source), _Place.of(target)))
        self.bytes_moved.append(source.nbytes)
        if source.data_ptr() in self._buffers:
            self._brought.append(StorageWeakRef(target.untyped_storage()))
        if self._is_late:
            target.fill_(torch.nan)
        else:
            self.wait(len(self._copies))
        return len(self._copies)

    def wait(self, copied: int) -> None:
        for source, target in self._copies[self._num_done : copied]:
            target.tensor().copy_(source.tensor())
        self._num_done = max(self._num_done, copied)
