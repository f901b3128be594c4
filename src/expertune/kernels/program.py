"""Program: the launches of a pass, noted once for inputs of a shape and repeated without the Python that led to them.

At short context a pass waits for Python: checks, allocations and views cost several times what submitting its launches
does. Between two batches of one shape nothing of it changes but addresses. So the second time that a function meets
inputs of a shape it is watched: every allocation, and every launch with the places its pointers point to. From then on
one workspace is allocated, with buffers that never live at once on top of each other, and the launches are submitted.

The idea is that of CUDA graphs, but nothing stays allocated between calls, inputs may lie anywhere, and a program can
itself be captured in a graph. A function that does more than allocate, view and launch is not noted: it runs as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels import launch
from expertune.kernels.launch import Launch, are_aligned

Tensors: TypeAlias = Sequence[Tensor | None]
Function: TypeAlias = Callable[[Any, Tensors], Tensors]

_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default})
_VIEWS = frozenset({
    _aten.view.default, _aten._unsafe_view.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default,
    _aten.detach.default, _aten.alias.default,
})  # fmt: skip
_WORKSPACE_ALIGNMENT = 256
_MOST_PROGRAMS = 256


class _Buffer:
    """One allocation that was watched, and the launches that it was first and last handed to."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.first: int | None = None
        self.last = 0


class _Watch(TorchDispatchMode):
    """Notes allocations and launches; knows after the function whether it did anything else."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.is_complete = True
        self.launches: list[tuple[Launch, list[tuple[int | _Buffer, torch.dtype]]]] = []  # and what they point to
        self._at: dict[int, int | _Buffer] = {}
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                self.is_complete &= tensor.data_ptr() not in self._at
                self._at[tensor.data_ptr()] = i

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and launch.is_watched():
            self._at[out.data_ptr()] = _Buffer(out.untyped_storage().nbytes())
        elif func not in _VIEWS and launch.is_watched():
            self.is_complete = False
        return out

    def note(self, made: Launch, tensors: Sequence[Tensor]) -> None:
        """A launch has been submitted."""
        pointees = [self.pointee(tensor) for tensor in tensors]
        for pointee in pointees:
            if isinstance(pointee, _Buffer):
                pointee.last = len(self.launches)
                pointee.first = pointee.last if pointee.first is None else pointee.first
        self.launches.append(
            (made, [(0 if pointee is None else pointee, t.dtype) for pointee, t in zip(pointees, tensors, strict=True)])
        )
        is_repeatable = made.found is not None or tensors[0].device.type != "cuda"
        self.is_complete &= is_repeatable and None not in pointees

    def pointee(self, tensor: Tensor) -> "int | _Buffer | None":
        """The input or the allocation at whose start a tensor starts."""
        return self._at.get(tensor.data_ptr())


class _Output(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Program:
    """What was watched of one function for inputs of one shape.

    Pointers are places: the number of a base (inputs, then outputs, then the workspace) and bytes beyond it.
    """

    def __init__(self, watch: _Watch, num_inputs: int, results: Tensors) -> None:
        self._outputs: list[_Output] = []
        self._results: list[int | None] = []  # of each result its base
        places: dict[_Buffer, tuple[int, int]] = {}
        for result in results:
            if result is None:
                self._results.append(None)
                continue
            buffer = watch.pointee(result)
            assert isinstance(buffer, _Buffer)
            if buffer not in places:
                places[buffer] = (num_inputs + len(self._outputs), 0)
                self._outputs.append(_Output(result.shape, result.stride(), result.dtype))
            self._results.append(places[buffer][0])
        pointees = {p for _, pointers in watch.launches for p, _ in pointers if isinstance(p, _Buffer)}
        temporaries = pointees - places.keys()
        offsets, self._workspace_bytes = _lay_out(sorted(temporaries, key=lambda b: (b.first or 0, b.num_bytes)))
        workspace = num_inputs + len(self._outputs)
        places |= {buffer: (workspace, offset) for buffer, offset in offsets.items()}
        self._launches = [
            (made, [places[p] if isinstance(p, _Buffer) else (p, 0) for p, _ in pointers], [d for _, d in pointers])
            for made, pointers in watch.launches
        ]

    def __call__(self, inputs: Tensors, device: torch.device) -> list[Tensor | None]:
        """The function's results for other inputs of the same shapes, dtypes and strides."""
        outputs = [torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=device) for o in self._outputs]
        workspace = torch.empty((self._workspace_bytes,), dtype=torch.uint8, device=device)
        bases = [*inputs, *outputs, workspace]
        if device.type == "cuda":
            addresses = [0 if base is None else base.data_ptr() for base in bases]
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            for made, places, _ in self._launches:
                made.repeat(stream, [addresses[base] + offset for base, offset in places])
        else:
            for made, places, dtypes in self._launches:
                made.interpret([_at(bases[b], o, dtype) for (b, o), dtype in zip(places, dtypes, strict=True)])
        return [None if i is None else bases[i] for i in self._results]


def _lay_out(buffers: Sequence[_Buffer]) -> tuple[dict[_Buffer, int], int]:
    """Offsets of buffers in one workspace, in the order of their first launch, each in the lowest gap; and its size."""
    offsets: dict[_Buffer, int] = {}
    size = 0
    for buffer in buffers:
        assert buffer.first is not None
        needed = -(-buffer.num_bytes // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
        offset = 0
        for other in sorted((b for b in offsets if b.last >= buffer.first), key=offsets.__getitem__):
            if offset + needed <= offsets[other]:
                break
            end = offsets[other] + other.num_bytes
            offset = max(offset, -(-end // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT)
        offsets[buffer] = offset
        size = max(size, offset + needed)
    return offsets, size


def _at(base: Tensor | None, offset: int, dtype: torch.dtype) -> Tensor:
    """For the interpreter, which takes tensors where a GPU takes addresses."""
    assert base is not None
    return base if base.dtype == dtype else base[offset:].view(dtype)


class Programs:
    """The programs of all functions, by name and shape."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Program | bool] = {}

    def run(self, function: Function, static: Any, inputs: Tensors, key: tuple[Any, ...]) -> Tensors:
        """`function(static, inputs)`, by its program if there is one.

        Args:
            function: pure, on tensors of one device; its results are none of its inputs.
            static: what else it takes.
            inputs: tensors.
            key: tells apart all that decides which launches it makes: `static`, and shapes, strides, dtypes of inputs.
        """
        program = self._known.get(key)
        if isinstance(program, Program):
            device = next(tensor for tensor in inputs if tensor is not None).device
            if _is_ready(inputs, device):
                return program(inputs, device)
        if program is not True:
            if program is None:
                self._remember(key, True)
            return function(static, inputs)
        with _Watch(inputs) as watch, launch.watched(watch.note):
            results = function(static, inputs)
        is_complete = watch.is_complete and all(_is_whole(result, watch) for result in results)
        self._remember(key, Program(watch, len(inputs), results) if is_complete else False)
        return results

    def _remember(self, key: tuple[Any, ...], known: Program | bool) -> None:
        """True: met once. False: not to be noted."""
        if len(self._known) >= _MOST_PROGRAMS and key not in self._known:
            del self._known[next(iter(self._known))]
        self._known[key] = known


def _is_ready(inputs: Tensors, device: torch.device) -> bool:
    """Whether every input starts where compiled kernels expect it, and the device is the current one."""
    return are_aligned([tensor.data_ptr() for tensor in inputs if tensor is not None]) and (
        device.type != "cuda" or device.index == torch.cuda.current_device()
    )


def _is_whole(result: Tensor | None, watch: _Watch) -> bool:
    """Whether a result is none, or all of an allocation."""
    if result is None:
        return True
    pointee = watch.pointee(result)
    return isinstance(pointee, _Buffer) and pointee.num_bytes == result.numel() * result.itemsize
