"""How much memory of a device is taken, and how much is left."""

from typing import Any, Protocol

import torch

_RESERVE = 1 / 16  # of a card's memory: what the allocator cannot use, and what other libraries take


class Meter(Protocol):
    """The memory of a device, in bytes."""

    def allocated(self) -> int:
        """By tensors, now."""
        ...

    def peak(self) -> int:
        """By tensors, at most so far."""
        ...

    def idle_part(self) -> float:
        """What the allocator holds for no tensor, as a part of what tensors take."""
        ...

    def free(self) -> int:
        """What more tensors could take now, less a reserve."""
        ...


class CudaMeter:
    """The memory of a CUDA device as torch's allocator and the driver see it. Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """By tensors, now."""
        return _of(self._stats(), "allocated_bytes", "current")

    def peak(self) -> int:
        """By tensors, at most since someone last reset it."""
        return _of(self._stats(), "allocated_bytes", "peak")

    def idle_part(self) -> float:
        """What the allocator holds for no tensor, also where only recorded work may take it, as a part of the rest."""
        stats = self._stats()
        return _idle(stats) / max(_of(stats, "allocated_bytes", "current"), 1)

    def room(self) -> int:
        """What the driver and the allocator have left: more cannot be had while others hold the rest."""
        return self._room_and_total()[0]

    def free(self) -> int:
        """`room`, less a reserve."""
        room, total = self._room_and_total()
        return room - int(total * _RESERVE)

    def _room_and_total(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._device)
        return free + _idle(self._stats()), total

    def _stats(self) -> dict[str, Any]:
        """As the allocator gives them: `torch.cuda.memory_allocated` sorts all of them first, which takes long."""
        return torch.cuda.memory_stats_as_nested_dict(self._device)


def _idle(stats: dict[str, Any]) -> int:
    return _of(stats, "reserved_bytes", "current") - _of(stats, "allocated_bytes", "current")


def _of(stats: dict[str, Any], kind: str, when: str) -> int:
    """Bytes; there are no statistics before a device has been used."""
    return int(stats[kind]["all"][when]) if stats else 0


def meter_of(device: torch.device) -> Meter | None:
    """None for a device whose memory is not counted: every layer is checkpointed there."""
    return CudaMeter(device) if device.type == "cuda" else None


def room_of(device: torch.device) -> int | None:
    """Bytes that tensors could still take on a device at most; None where memory is not counted."""
    return CudaMeter(device).room() if device.type == "cuda" else None
