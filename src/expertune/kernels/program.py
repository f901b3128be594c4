"""Program: the launches of a pass, noted once for inputs of a shape and repeated without the Python that led to them.

At short context a pass waits for Python: checks and views cost several times what submitting its launches does. Between
two batches of one shape nothing of it changes but addresses. So the second time that a function meets inputs of a shape
it is watched: every allocation, and every launch with the tensors that its pointers point to. From then on only that is
repeated: each tensor is allocated right before the first launch that takes it and let go after the last.

The idea is that of CUDA graphs, but nothing stays allocated between calls, inputs may lie anywhere, and a program can
itself be captured in a graph. A function that does more than allocate, view and launch is not noted: it runs as it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels import launch
from expertune.kernels.launch import Launch, are_aligned
from expertune.shapes import Pass, Tensors

_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default})
_VIEWS = frozenset({
    _aten.view.default, _aten._unsafe_view.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default,
    _aten.detach.default, _aten.alias.default,
})  # fmt: skip
_MOST_PROGRAMS = 256


class _Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _form(tensor: Tensor) -> _Form:
    return _Form(tensor.shape, tensor.stride(), tensor.dtype)


class _Buffer:
    """An allocation that was watched, and the launches that it was first and last handed to."""

    def __init__(self, tensor: Tensor) -> None:
        self.form = _form(tensor)
        self.first: int | None = None
        self.last = 0


class _Watch(TorchDispatchMode):
    """Notes allocations and launches; knows after the function whether it did anything else."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.is_complete = True
        self.launches: list[tuple[Launch, list[int | _Buffer]]] = []  # with the inputs and buffers they point to
        self._at: dict[int, int | _Buffer] = {}
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                self.is_complete &= tensor.data_ptr() not in self._at
                self._at[tensor.data_ptr()] = i

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if launch.is_watched():
            if func in _ALLOCATIONS:
                self._at[out.data_ptr()] = _Buffer(out)
            else:
                self.is_complete &= func in _VIEWS
        return out

    def note(self, made: Launch, tensors: Sequence[Tensor]) -> None:
        """A launch has been submitted."""
        pointees = [self.pointee(tensor) for tensor in tensors]
        for pointee in pointees:
            if isinstance(pointee, _Buffer):
                pointee.last = len(self.launches)
                pointee.first = pointee.last if pointee.first is None else pointee.first
        self.launches.append((made, [pointee for pointee in pointees if pointee is not None]))
        is_repeatable = made.found is not None or tensors[0].device.type != "cuda"
        self.is_complete &= is_repeatable and None not in pointees

    def pointee(self, tensor: Tensor) -> "int | _Buffer | None":
        """The input or the allocation at whose start a tensor starts."""
        return self._at.get(tensor.data_ptr())


class _Event(NamedTuple):
    """A launch, with the places of what it points to, and of what is allocated before it and let go after it."""

    made: Launch
    places: list[int]
    born: list[tuple[int, _Form]]
    dead: list[int]


class Program:
    """What was watched of one function for inputs of one shape. A place is the number of an input or of a buffer."""

    def __init__(self, watch: _Watch, num_inputs: int, results: Tensors) -> None:
        buffers: dict[_Buffer, int] = {}
        for _, pointees in watch.launches:
            for buffer in pointees:
                if isinstance(buffer, _Buffer):
                    buffers.setdefault(buffer, num_inputs + len(buffers))
        self._num_buffers = len(buffers)
        self._results: list[int | None] = []
        for result in results:
            pointee = None if result is None else watch.pointee(result)
            if result is not None and isinstance(pointee, _Buffer):
                pointee.form = _form(result)
            self._results.append(buffers[pointee] if isinstance(pointee, _Buffer) else None)
        self._events = [
            _Event(
                made=made,
                places=[buffers[p] if isinstance(p, _Buffer) else p for p in pointees],
                born=[(place, buffer.form) for buffer, place in buffers.items() if buffer.first == i],
                dead=[place for b, place in buffers.items() if b.last == i and place not in self._results],
            )
            for i, (made, pointees) in enumerate(watch.launches)
        ]

    def __call__(self, inputs: Tensors, input_addresses: list[int], device: torch.device) -> list[Tensor | None]:
        """The function's results for other inputs, with their addresses, of the same shapes, dtypes and strides."""
        is_cuda = device.type == "cuda"
        stream = torch._C._cuda_getCurrentRawStream(device.index) if is_cuda else 0
        tensors: list[Any] = [*inputs, *[None] * self._num_buffers]
        addresses = [*input_addresses, *[0] * self._num_buffers]
        for made, places, born, dead in self._events:
            for place, (shape, stride, dtype) in born:
                tensors[place] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                addresses[place] = tensors[place].data_ptr()
            if is_cuda:
                made.repeat(stream, [addresses[place] for place in places])
            else:
                made.interpret([tensors[place] for place in places])
            for place in dead:
                tensors[place] = None
        return [None if place is None else tensors[place] for place in self._results]


class Programs:
    """The programs of all functions, by name and shape."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Program | bool] = {}

    def run(self, function: Pass, static: Any, inputs: Tensors) -> Tensors:
        """`function(static, inputs)`, by its program if there is one.

        Args:
            function: pure, on tensors of one device; its results are none of its inputs.
            static: all that decides which launches it makes, beside that device and the inputs' shapes, strides and
                dtypes. Hashable.
            inputs: tensors; the first is one.
        """
        assert inputs[0] is not None
        device = inputs[0].device
        forms = [None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs]
        key = (function, static, device, *forms)
        program = self._known.get(key)
        if isinstance(program, Program) and (device.type != "cuda" or device.index == torch.cuda.current_device()):
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
            if are_aligned(addresses):
                return program(inputs, addresses, device)
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


def _is_whole(result: Tensor | None, watch: _Watch) -> bool:
    """Whether a result is none, or all of what a launch was handed."""
    if result is None:
        return True
    pointee = watch.pointee(result)
    if not isinstance(pointee, _Buffer) or pointee.first is None:
        return False
    return result.dtype == pointee.form.dtype and result.numel() == pointee.form.shape.numel()
