"""The inputs that checkpointed layers keep, moved to memory of the host in forward and brought back in backward.

A checkpointed model still keeps `2D` bytes a token and layer in 16 bits. Each input is copied while its own layer runs,
and gives up its place on the device when the layer is done. In backward, while one layer runs again, the input of the
layer before comes back: so two of them lie on the device at once, however many layers there are. The idea of swapping
activations is that of Rhu et al. 2016, "vDNN". The last layer's input stays, because it is wanted first.

Nothing waits for the device but the device itself, and nothing is left to `record_stream`: memory that is freed under
it can be used again only once the host has seen the copy's end, and the host runs layers ahead. What a copy reads or
writes is held until the device has been told to wait for it.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from expertune.memory.host_room import host_room

# 32 MiB a layer at D = 2,048 in 16 bits, 1.5 GiB in 48 layers. PCIe 5 copies them in 0.7 ms, and 3 billion active
# parameters in 48 layers are at least 2 ms of products a layer on an H100 (by count). With fewer tokens the inputs are
# little beside the weights, and a step waits for the host, which would have more to submit.
LEAST_TOKENS = 8192
# An input lies in chunks, because torch's allocator of pinned memory takes powers of two: 33 MiB in one buffer would be
# 64. A power of two itself, and long enough that a copy takes a hundred times as long as to submit it (by count).
CHUNK_BYTES = 2**25
# Of the host's memory, for whatever else the process and others may want: one that takes all is killed.
_SPARED_BYTES = 2**32


class Lane(Protocol):
    """Copies between a device and the host, one after the other, beside the device's own work."""

    def buffer(self, num_bytes: int) -> Tensor | None:
        """Memory of the host that the device reads and writes by itself, `(num_bytes,)` uint8; None for none left."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> Any:
        """Begin a copy once the work that the device has been given so far is done. What stands for its end."""
        ...

    def wait(self, copied: Any) -> None:
        """Let the work that the device is given from now on begin after that copy."""
        ...


class CudaLane:
    """A stream of its own, and pinned memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, num_bytes: int) -> Tensor | None:
        """Waits for the device: taken in the first steps, then used again."""
        if host_room() < num_bytes + _SPARED_BYTES:
            return None
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """See `Lane`. Source and target must live until someone has waited."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record(self._stream)
        return end

    def wait(self, copied: torch.cuda.Event) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self._device).wait_event(copied)


def lane_of(device: torch.device) -> Lane | None:
    """None for a device whose inputs stay where they are."""
    return CudaLane(device) if device.type == "cuda" else None


class Offload:
    """The inputs of one model's layers. One object a model, kept from step to step.

    Args:
        lane_of: the lane of a device.
        least_tokens: of an input that is moved.
    """

    def __init__(
        self, lane_of: Callable[[torch.device], Lane | None] = lane_of, least_tokens: int = LEAST_TOKENS
    ) -> None:
        self._lane_of = lane_of
        self.least_tokens = least_tokens
        self._shelves: dict[torch.device, _Shelf | None] = {}

    @contextmanager
    def moving(self, x: Tensor, *, stays: bool = False) -> Iterator[None]:
        """Around a checkpointed call on `x`: of what torch saves for the second run, `x` alone is moved.

        Right for both of torch's checkpoints, which save through the hooks that are set around them. Not for
        `torch.compile`, where the compiler decides what is saved, and sets no hooks of ours.

        Args:
            x: `(…, tokens, D)`.
            stays: whether it stays on the device, and only calls the layer before back.

        Raises:
            RuntimeError: the call wrote to `x`; torch would run it again on what it wrote.
        """
        shelf = self._shelf(x.device) if self._pays(x) else None
        if shelf is None:
            yield
            return
        before = shelf.last()
        buffers = None if stays else shelf.take(x.nbytes)
        held = _Kept(x.detach(), before) if buffers is None else _Moved(x.detach(), before, shelf, buffers)
        shelf.last = weakref.ref(held)
        form, version = _form(x), x._version

        def pack(saved: Tensor) -> Tensor | _Held:
            return held if _form(saved) == form else saved

        try:
            with saved_tensors_hooks(pack, _unpack):
                yield
        finally:
            held.settle()
        if x._version != version:
            raise RuntimeError(
                "a layer wrote to its input, so it cannot be run again for backward. Use memory='fast', or let the "
                "layer make a new tensor."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Streams and buffers belong to one model in one process; a copy makes its own."""
        return vars(self) | {"_shelves": {}}

    def _pays(self, x: Tensor) -> bool:
        is_wanted = torch.is_grad_enabled() and x.requires_grad
        # autograd itself holds a leaf, and a view of rows that lie apart would come back otherwise
        return is_wanted and not x.is_leaf and x.is_contiguous() and x.shape[:-1].numel() >= self.least_tokens

    def _shelf(self, device: torch.device) -> "_Shelf | None":
        if device not in self._shelves:
            lane = self._lane_of(device)
            self._shelves[device] = None if lane is None else _Shelf(lane)
        return self._shelves[device]


class _Shelf:
    """Buffers for one device, and the input that was put away last."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.last: Callable[[], _Held | None] = lambda: None
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, num_bytes: int) -> list[Tensor] | None:
        """Buffers that hold so many bytes together: chunks, and for the rest a power of two, at least half of it used.

        So batches of all lengths share chunks, and the rests that others leave sum to less than one chunk.
        None where the host has no memory for them, as is said once.
        """
        num_chunks, rest = divmod(num_bytes, CHUNK_BYTES)
        lengths = [CHUNK_BYTES] * num_chunks + ([1 << (rest - 1).bit_length()] if rest else [])
        taken: list[Tensor] = []
        for length in lengths:
            buffer = self._free[length].pop() if self._free[length] else self.lane.buffer(length)
            if buffer is None:
                self.give_back(taken)
                warnings.warn(
                    f"the host has no memory to spare for the input of a layer, {num_bytes / 2**20:,.0f} MiB: it stays "
                    "on the device, as do those of the layers that find none either. Shorter batches need less.",
                    stacklevel=2,
                )
                return None
            taken.append(buffer)
        return taken

    def give_back(self, buffers: list[Tensor]) -> None:
        """They may still be read from: the next copy into them is on the same lane."""
        for buffer in buffers:
            self._free[len(buffer)].append(buffer)

    def copy(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Copy sources to targets, in order. What stands for the end of the last."""
        return [self.lane.copy(source, target) for source, target in parts][-1]


class _Kept:
    """An input that stays on the device."""

    def __init__(self, x: Tensor, before: "_Held | None") -> None:
        self._x = x
        self._before = _reference(before)

    def settle(self) -> None:
        """Nothing is under way."""

    def fetch(self) -> None:
        """It is there."""

    def get(self) -> Tensor:
        """The input; the one before begins to come back."""
        _fetch(self._before)
        return self._x


class _Moved:
    """An input in memory of the host."""

    def __init__(self, x: Tensor, before: "_Held | None", shelf: _Shelf, buffers: list[Tensor]) -> None:
        self._before = _reference(before)
        self._shelf, self._buffers = shelf, buffers
        self._make = partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        self._coming: tuple[Tensor, Any] | None = None
        self._stored = shelf.copy(_parts(x, self._buffers))

    def settle(self) -> None:
        """After the layer: what is freed or written from now on, no copy reads any more."""
        self._shelf.lane.wait(self._stored)

    def fetch(self) -> None:
        """Begin to bring it back, unless it is on its way."""
        if self._coming is None:
            x = self._make()
            self._coming = x, self._shelf.copy((stored, part) for part, stored in _parts(x, self._buffers))

    def get(self) -> Tensor:
        """The input; the one before begins to come back. Asked for again, it is brought again."""
        self.fetch()
        assert self._coming is not None
        x, copied = self._coming
        self._coming = None
        self._shelf.lane.wait(copied)
        _fetch(self._before)
        return x

    def __del__(self) -> None:
        """With the graph, used or not."""
        if self._coming is not None:  # its memory goes to whoever asks next
            self._shelf.lane.wait(self._coming[1])
        self._shelf.give_back(self._buffers)


_Held: TypeAlias = _Kept | _Moved


def _unpack(packed: Tensor | _Held) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.get()


def _parts(x: Tensor, buffers: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a contiguous tensor, each with where it lies in its buffer."""
    flat, start = x.view(-1), 0
    for buffer in buffers:
        part = flat[start : start + len(buffer) // x.itemsize]
        yield part, buffer[: part.nbytes].view(x.dtype)
        start += len(part)


def _form(x: Tensor) -> tuple[Any, ...]:
    """By which a tensor is known again."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _reference(held: _Held | None) -> Callable[[], _Held | None]:
    return (lambda: None) if held is None else weakref.ref(held)


def _fetch(reference: Callable[[], _Held | None]) -> None:
    if (held := reference()) is not None:
        held.fetch()
