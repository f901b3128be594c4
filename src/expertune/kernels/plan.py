"""Plan: what a program allocates, when, and where each pointer of its launches then points.

At short context an allocation costs as much as a launch, so everything is taken at once: the results, and one block
for all that only lives inside, in which later tensors take the place of earlier ones. At long context the GPU is what a
step waits for, and memory what it lacks: then each tensor is taken right before the first launch that it is handed to,
and let go after the last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertune.kernels.launch import ceil_div
from expertune.kernels.submit import Spot

_MOST_AT_ONCE = 2**30  # bytes
_ALIGNMENT = 256  # bytes, of tensors that share a block


class Form(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def extent(self) -> int:
        """Bytes from the first element to behind the last."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Buffer:
    """Something allocated in a pass: its form, and the launches that it was first and last handed to."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.first: int | None = None
        self.last = 0


class Pointee(NamedTuple):
    """Where a pointer points in a pass: into an input, by its number, or into a buffer; and bytes from its start."""

    owner: "int | Buffer"
    offset: int


class Stretch(NamedTuple):
    """Launches from one number to another, with the places that are allocated before and let go after them."""

    launches: range
    born: list[tuple[int, Form]]
    dead: list[int]


class Plan(NamedTuple):
    """A place is the number of an input, and after the inputs of what is allocated.

    Args:
        num_places: inputs and allocations together.
        stretches: in order.
        spots: of each launch, where its pointers point.
    """

    num_places: int
    stretches: list[Stretch]
    spots: list[list[Spot]]


def plan(launches: Sequence[Sequence[Pointee]], num_inputs: int, results: Sequence[Buffer]) -> Plan:
    """When to allocate what.

    The results take the first places behind the inputs, in their order.

    Args:
        launches: of each launch, where its pointers pointed.
        num_inputs: places of inputs.
        results: buffers that outlive the pass.
    """
    inner = list({
        pointee.owner: None
        for pointees in launches
        for pointee in pointees
        if isinstance(pointee.owner, Buffer) and pointee.owner not in results
    })  # fmt: skip
    offsets, block = _share(inner)
    num_buffers = num_inputs + len(results)
    born = [(num_inputs + i, buffer.form) for i, buffer in enumerate(results)]
    where = {buffer: Spot(num_inputs + i, 0) for i, buffer in enumerate(results)}
    if block + sum(buffer.form.extent for buffer in results) <= _MOST_AT_ONCE:
        where |= {buffer: Spot(num_buffers, offsets[buffer]) for buffer in inner}
        born.append((num_buffers, Form((block,), (1,), torch.uint8)))
        stretches = [Stretch(range(len(launches)), born, dead=[num_buffers])]
        num_places = num_buffers + 1
    else:
        where |= {buffer: Spot(num_buffers + i, 0) for i, buffer in enumerate(inner)}
        placed = [(where[buffer].place, buffer) for buffer in (*results, *inner)]
        stretches = [
            Stretch(
                range(i, i + 1),
                born=[(place, buffer.form) for place, buffer in placed if buffer.first == i],
                dead=[place for place, buffer in placed if buffer.last == i and place >= num_buffers],
            )
            for i in range(len(launches))
        ]
        num_places = num_buffers + len(inner)
    return Plan(num_places, stretches, [[_spot(pointee, where) for pointee in pointees] for pointees in launches])


def _spot(pointee: Pointee, where: dict[Buffer, Spot]) -> Spot:
    if not isinstance(pointee.owner, Buffer):
        return Spot(pointee.owner, pointee.offset)
    place, offset = where[pointee.owner]
    return Spot(place, offset + pointee.offset)


def _share(buffers: Sequence[Buffer]) -> tuple[dict[Buffer, int], int]:
    """Where each buffer starts in one block, the largest first, each as low as those alive at the time allow."""
    offsets: dict[Buffer, int] = {}
    end = 0
    for buffer in sorted(buffers, key=lambda buffer: -buffer.form.extent):
        size = _aligned(buffer.form.extent)
        start = 0
        for other in sorted((b for b in offsets if _overlap(b, buffer)), key=offsets.__getitem__):
            if start + size <= offsets[other]:
                break
            start = max(start, offsets[other] + _aligned(other.form.extent))
        offsets[buffer] = start
        end = max(end, start + size)
    return offsets, end


def _aligned(num_bytes: int) -> int:
    return ceil_div(num_bytes, _ALIGNMENT) * _ALIGNMENT


def _overlap(a: Buffer, b: Buffer) -> bool:
    """Whether there is a launch at which both are alive."""
    assert a.first is not None
    assert b.first is not None
    return a.first <= b.last and b.first <= a.last
