"""Program: the launches of a pass, noted once for inputs of a shape and repeated without the Python that led to them.

At short context a pass waits for Python: checks and views cost several times what submitting its launches does. Between
two batches of one shape nothing of it changes but addresses. So the second time that a function meets inputs of a shape
it is watched: every allocation, and every launch with the tensors that its pointers point to. From then on only that is
repeated: `plan` says when to allocate, `submit` hands the launches to the driver.

The idea is that of CUDA graphs, but nothing stays allocated between calls, inputs may lie anywhere, and a program can
itself be captured in a graph. A function that does more than allocate, view and launch is not noted: it runs as it is.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels import launch, submit
from expertune.kernels.ahead import compile_ahead
from expertune.kernels.launch import Launch, are_aligned
from expertune.kernels.plan import Buffer, Form, Pointee, plan
from expertune.shapes import Pass, Tensors

_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default})
_VIEWS = frozenset({
    _aten.view.default, _aten._unsafe_view.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default,
    _aten.slice.Tensor, _aten.detach.default, _aten.alias.default,
})  # fmt: skip
_MOST_PROGRAMS = 256


class _Noted(NamedTuple):
    """A launch, and of each of its pointers where it pointed and what lay there."""

    made: Launch
    pointees: list[Pointee]
    forms: list[Form]


class _Watch(TorchDispatchMode):
    """Notes allocations and launches; knows after the function whether it did anything else."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.is_complete = True
        self.launches: list[_Noted] = []
        self._owners: list[tuple[range, int | Buffer]] = []  # of memory
        for i, tensor in enumerate(inputs):
            if tensor is not None:
                self.is_complete &= not self._take(tensor, i)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if launch.is_watched():
            if func in _ALLOCATIONS:
                self._take(out, Buffer(Form.of(out)))
            else:
                self.is_complete &= func in _VIEWS
        return out

    def note(self, made: Launch, tensors: Sequence[Tensor]) -> None:
        """A launch has been submitted."""
        found = [self.pointee(tensor) for tensor in tensors]
        pointees = [pointee for pointee in found if pointee is not None]
        for owner, _ in pointees:
            if isinstance(owner, Buffer):
                owner.last = len(self.launches)
                owner.first = owner.last if owner.first is None else owner.first
        self.launches.append(_Noted(made, pointees, [Form.of(tensor) for tensor in tensors]))
        is_repeatable = made.compiled is not None or tensors[0].device.type != "cuda"
        self.is_complete &= is_repeatable and len(pointees) == len(tensors)

    def pointee(self, tensor: Tensor) -> Pointee | None:
        """The input or the allocation in which a tensor starts."""
        address = tensor.data_ptr()
        for memory, owner in self._owners:
            if address in memory:
                return Pointee(owner, address - memory.start)
        return None

    def result(self, tensor: Tensor) -> Buffer | None:
        """The allocation that a tensor is the whole of, if a launch was handed it; it then has the tensor's form."""
        pointee = self.pointee(tensor)
        if pointee is None or not isinstance(pointee.owner, Buffer) or pointee.offset or pointee.owner.first is None:
            return None
        if Form.of(tensor).extent != pointee.owner.form.extent:
            return None
        pointee.owner.form = Form.of(tensor)
        return pointee.owner

    def _take(self, tensor: Tensor, owner: int | Buffer) -> bool:
        """Note who owns a tensor's memory from now on, and say whether any of it had an owner."""
        start = tensor.data_ptr()
        memory = range(start, start + Form.of(tensor).extent)
        others = [(m, o) for m, o in self._owners if m.stop <= memory.start or memory.stop <= m.start]
        had_owner = len(others) < len(self._owners)
        self._owners = [*others, (memory, owner)]
        return had_owner


class Program:
    """What was watched of one function for inputs of one shape.

    Args:
        launches: what to repeat.
        num_inputs: of the function.
        results: of the function, each an allocation or None.
        driver: of the device, or None in the interpreter.

    Raises:
        ValueError: it cannot be submitted.
    """

    def __init__(
        self,
        launches: Sequence[_Noted],
        num_inputs: int,
        results: Sequence[Buffer | None],
        driver: submit.Driver | None,
    ) -> None:
        kept = list(dict.fromkeys(result for result in results if result is not None))
        self._results = [None if result is None else num_inputs + kept.index(result) for result in results]
        self._launches = launches
        self._plan = plan([noted.pointees for noted in launches], num_inputs, kept)
        self._num_allocations = self._plan.num_places - num_inputs
        self._lock = threading.Lock()  # around what the submission keeps of a run
        self._submission = None
        if driver is not None:
            stretches = [
                [(launches[i].made, self._plan.spots[i]) for i in stretch.launches] for stretch in self._plan.stretches
            ]
            self._submission = submit.Submission(driver, stretches)

    def __call__(self, inputs: Tensors, input_addresses: list[int], device: torch.device) -> list[Tensor | None]:
        """The function's results for other inputs, with their addresses, of the same shapes, dtypes and strides."""
        stream = 0 if self._submission is None else torch._C._cuda_getCurrentRawStream(device.index)
        tensors: list[Any] = [*inputs, *[None] * self._num_allocations]
        addresses = [*input_addresses, *[0] * self._num_allocations]
        with self._lock:
            for number, (launches, born, dead) in enumerate(self._plan.stretches):
                for place, (shape, stride, dtype) in born:
                    tensors[place] = tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                    addresses[place] = tensor.data_ptr()
                if self._submission is not None:
                    self._submission.run(number, stream, addresses)
                else:
                    self._interpret(launches, tensors)
                for place in dead:
                    tensors[place] = None
        return [None if place is None else tensors[place] for place in self._results]

    def _interpret(self, launches: range, tensors: Sequence[Tensor]) -> None:
        for i in launches:
            made, _, forms = self._launches[i]
            spots = zip(self._plan.spots[i], forms, strict=True)
            made.interpret([_view(tensors[place], offset, form) for (place, offset), form in spots])


def _view(tensor: Tensor, offset: int, form: Form) -> Tensor:
    """Other bytes of a tensor's memory, from `offset` on."""
    start = tensor.storage_offset() * tensor.itemsize + offset
    view = torch.empty(0, dtype=form.dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), start // form.dtype.itemsize, form.shape, form.stride)


class Programs:
    """The programs of all functions, by name and shape."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Program | bool] = {}
        self._built: set[tuple[Any, ...]] = set()

    def run(self, function: Pass, static: Any, inputs: Tensors, ahead: Pass | None = None) -> Tensors:
        """`function(static, inputs)`, by its program if there is one.

        Args:
            function: pure, on tensors of one device; its results are none of its inputs.
            static: all that decides which launches it makes, beside that device and the inputs' shapes, strides and
                dtypes. Hashable.
            inputs: tensors; the first is one.
            ahead: of the same arguments, makes the launches of `function` and of the passes that will follow. It is
                never run, but on CUDA their kernels are built at once.
        """
        assert inputs[0] is not None
        device = inputs[0].device
        if _is_elsewhere(device):
            # a model that lies on several: the hooks that move a layer's inputs leave the current device as it is
            with torch.cuda.device(device):
                return self.run(function, static, inputs, ahead)
        key = _key(function, static, inputs)
        program = self._known.get(key)
        if isinstance(program, Program):
            addresses = _addresses(inputs)
            if are_aligned(addresses):
                return program(inputs, addresses, device)
        if program is not True:
            if program is None:
                self._remember(key, True)
                if device.type == "cuda":
                    self._build(ahead or function, static, inputs, device)
            with _no_autocast(device):
                return function(static, inputs)
        with _Watch(inputs) as watch, launch.watched(watch.note), _no_autocast(device):
            results = function(static, inputs)
        self._remember(key, _make(watch, inputs, results, device))
        return results

    def settled(self, function: Pass, static: Any, inputs: Tensors) -> Program | bool | None:
        """The program by which `run` answers these arguments, False if it never has one; None until that is known."""
        known = self._known.get(_key(function, static, inputs))
        return None if known is True else known

    def _build(self, function: Pass, static: Any, inputs: Tensors, device: torch.device) -> None:
        """Build the kernels of a pass, once for all layers and lengths: inputs that differ in their first size alone.

        Two layers of such inputs may still differ in a kernel; that one is then built when it is first launched.
        """
        kind = (function, device, *[None if tensor is None else (tensor.dtype, tensor.shape[1:]) for tensor in inputs])
        if kind not in self._built:
            self._built.add(kind)
            with _no_autocast(device):
                compile_ahead(function, static, inputs, device)

    def _remember(self, key: tuple[Any, ...], known: Program | bool) -> None:
        """True: met once. False: not to be noted."""
        if len(self._known) >= _MOST_PROGRAMS and key not in self._known:
            del self._known[next(iter(self._known))]
        self._known[key] = known


class Bound:
    """`Programs.run` of a function whose first inputs stay where they are: these are looked at once.

    Args:
        programs: whose.
        function, static: as for `Programs.run`.
        first: tensors; the first is one.
    """

    def __init__(self, programs: Programs, function: Pass, static: Any, first: Tensors) -> None:
        assert first[0] is not None
        self._run = partial(programs.run, function, static)
        self._settled = partial(programs.settled, function, static)
        self._first, self._addresses, self._device = first, _addresses(first), first[0].device
        self._found: dict[tuple[Any, ...], Program | bool] = {}

    def __call__(self, others: Tensors) -> Tensors:
        """The function's results, with these for its other inputs."""
        forms, inputs = _forms(others), (*self._first, *others)
        found = self._found.get(forms)
        if isinstance(found, Program) and not _is_elsewhere(self._device):
            addresses = [*self._addresses, *_addresses(others)]
            if are_aligned(addresses):
                return found(inputs, addresses, self._device)
        results = self._run(inputs)
        if found is None and (settled := self._settled(inputs)) is not None:
            self._found[forms] = settled
        return results


def _forms(tensors: Tensors) -> tuple[Any, ...]:
    return tuple(None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors)


def _key(function: Pass, static: Any, inputs: Tensors) -> tuple[Any, ...]:
    assert inputs[0] is not None
    return (function, static, inputs[0].device, *_forms(inputs))


def _addresses(tensors: Tensors) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _is_elsewhere(device: torch.device) -> bool:
    """Whether another device is the current one."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _make(watch: _Watch, inputs: Tensors, results: Tensors, device: torch.device) -> Program | bool:
    """The program of what was watched, or False if it cannot be repeated."""
    found = [None if result is None else watch.result(result) for result in results]
    are_found = all(result is None or buffer is not None for result, buffer in zip(results, found, strict=True))
    driver = submit.driver() if device.type == "cuda" else None
    if not (watch.is_complete and watch.launches and are_found) or (driver is None and device.type == "cuda"):
        return False
    try:
        return Program(watch.launches, len(inputs), found, driver)
    except ValueError:  # a kernel of a Triton that we do not know; it is launched by Triton
        return False
