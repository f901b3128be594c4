"""One call of a module, forward and backward, recorded over tensors that stay where they are, and replayed."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from expertune import accumulate
from expertune.accumulate import Postponed
from expertune.graphs.capture import Graph
from expertune.graphs.pool import Pool, Shared
from expertune.graphs.structure import put_together, take_apart
from expertune.prepare import Preparation

_LARGE = 2**20  # bytes of a gradient from which it is copied out of a graph by itself


def tokens_of(inputs: Sequence[Tensor]) -> int:
    """Of a call: its hidden states have them before their last dimension, and nothing has more."""
    return max(tensor.shape[:-1].numel() for tensor in inputs)


class Recording:
    """The two graphs of a call.

    What goes in is copied to tensors of the recording, or to ones that recordings share; what comes out is copied from
    such, but for gradients that are postponed: these are computed after the replay. So nobody holds a tensor that a
    later step writes to. What backward needs stays in the recording's own memory.

    `keeps` says that it does; `rerun.py` is a recording whose backward runs forward again.

    Args:
        call: the module's forward, as a function of its tensors and of what stands for its parameters.
        inputs: these tensors, as they are now.
        parameters: those that want a gradient.
        pool: what recordings share.

    Raises:
        RuntimeError: the module waits for the device, or there is no memory.
    """

    keeps = True

    def __init__(
        self,
        call: Callable[[Sequence[Tensor], Sequence[Tensor]], Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        pool: Pool,
    ) -> None:
        self.number = pool.next_number()
        self.tokens = tokens_of(inputs)  # of the calls that it serves
        self._pool, self._call, self._parameters = pool, call, tuple(parameters)
        # on the parameters' memory, but unknown to whoever else keeps an eye on these, as data parallelism does
        self._leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        # those whose gradients are large, and may be added to what is there; None for the others
        self.added = [parameter if parameter.nbytes >= _LARGE else None for parameter in parameters]
        self._large_leaves = [leaf for leaf in self._leaves if leaf.nbytes >= _LARGE]
        # one that runs again prepares nothing, which would be kept from one step to the next
        self._preparation = Preparation(self._leaves if self.keeps else [])
        self._prepared: list[int] = []  # the versions of what it was made from
        self._number_of = {id(leaf): number for number, leaf in enumerate(self._leaves)}
        self._pass: Callable[[], _Pass | None] = lambda: None
        before = pool.allocated()
        self._own, self._shared = self._places(inputs)
        by_place = dict(self._own) | {i: shared.tensor for i, shared in self._shared}
        self._tensors = [by_place[i] for i in range(len(inputs))]
        self._rest: Any = None
        self._outs: list[Tensor] = []

        self._load(inputs)
        self._large: list[Tensor] = []
        self._postponed: list[Postponed] = []
        self.wanted_outs: list[int] = []  # the numbers of the outputs that carry a gradient
        self._leaving, self._numbers_of_large, self._douts = self._try()
        with pool.capture.refusing_waits():
            self._run_both()
        self._forget()
        pool.make_room()
        self._ahead = pool.capture.record_alone(self._preparation.run) if self._preparation else None
        self._forward, self._backward = self._capture()
        self._large = [pool.capture.lend(grad) for grad in self._large]
        self._postponed = [self._lend(each) for each in self._postponed]
        pool.note_size(self, before)

    @property
    def is_pending(self) -> bool:
        """Whether a backward is to come, whose tensors another forward would write over."""
        return self._pass() is not None

    def may_begin(self, inputs: Sequence[Tensor]) -> bool:
        """Whether it can be replayed on these inputs now; see `Pool.may_begin`."""
        return self._pool.may_begin(self, [(shared, inputs[i]) for i, shared in self._shared])

    def versions(self) -> list[int]:
        """Of the trained parameters, other ones once one has been written to."""
        return [parameter._version for parameter in self._parameters]

    def prepare(self) -> None:
        """Compute what forward reads of parameters alone, before each replay of it; not while a backward is to come."""
        if self._ahead is not None:
            self._ahead.replay()
            self._prepared = self._preparation.versions()

    def is_prepared(self) -> bool:
        """Whether none of these parameters has been written to since."""
        return self._ahead is None or self._prepared == self._preparation.versions()

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the module's forward returns for these inputs, differentiable as it is; once prepared."""
        outs = _Replay.apply(self, len(inputs), *inputs, *self._parameters)  # type: ignore[no-untyped-call]
        return put_together(self._rest, iter(outs))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], "_Pass | None"]:
        """The outputs, and what stands for their backward: once nobody holds it, none is to come."""
        self._load(inputs)
        self._forward.replay()
        return tuple(out.clone() for out in self._outs), self._begin()  # without history: in a function of autograd

    def backward(
        self, begun: Any, douts: Sequence[Tensor], sums: Sequence[Tensor | None], *, is_last: bool
    ) -> list[Tensor | None]:
        """The gradients of the inputs that want one, then of the parameters.

        Args:
            begun: from `forward`; the inputs, if the recording keeps nothing.
            douts: of the outputs that want one.
            sums: of each parameter what a large gradient is added to in place, or None; it is then None too.
            is_last: whether no other backward of this forward follows.

        Raises:
            RuntimeError: another forward has been replayed since, or this backward was the last already.
        """
        self._take_up(begun)
        for mine, dout in zip(self._douts, douts, strict=True):
            mine.copy_(dout)
        self._backward.replay()
        if is_last:
            self._pass = lambda: None
        grads: list[Tensor | None] = [None] * (len(self._own) + len(self._parameters))
        for leaving in self._leaving:
            for number, part in zip(leaving.numbers, leaving.copy(), strict=True):
                grads[number] = part
        all_sums = [*[None] * len(self._own), *sums]
        for number, grad in zip(self._numbers_of_large, self._large, strict=True):
            if (total := all_sums[number]) is None:
                grads[number] = grad.clone()
            else:
                total.add_(grad)
        for each in self._postponed:
            places = [len(self._own) + self._number_of[leaf] for leaf in map(id, each.leaves)]
            totals = [grads[place] if all_sums[place] is None else all_sums[place] for place in places]
            for place, made in zip(places, each.compute(totals), strict=True):
                grads[place] = grads[place] if made is None else made
        return grads

    @property
    def wants(self) -> list[int]:
        """The places of the inputs that want a gradient."""
        return [place for place, _ in self._own]

    def _places(self, inputs: Sequence[Tensor]) -> tuple[list["Own"], list[tuple[int, Shared]]]:
        """Where inputs are copied to: those that want a gradient, and the others."""
        own = [Own(i, torch.empty_like(x).requires_grad_()) for i, x in enumerate(inputs) if x.requires_grad]
        shared = [(i, self._pool.shared(x)) for i, x in enumerate(inputs) if not x.requires_grad]
        for _, each in shared:
            each.users.add(self)
        return own, shared

    def _capture(self) -> tuple[Graph, Graph]:
        """Forward and backward."""
        record = self._pool.capture.record
        return record(self._run_forward, keeps=True), record(self._run_backward, keeps=False)

    def _begin(self) -> "_Pass | None":
        """What stands for the backward of a forward that was replayed."""
        begun = _Pass()
        self._pass = weakref.ref(begun)
        self._pool.begin(self)
        return begun

    def _take_up(self, begun: Any) -> None:
        """See that a backward can be replayed."""
        if self._pass() is not begun:
            raise RuntimeError(
                "backward came a second time, without retain_graph=True in the first or after another forward of the "
                "same layer. Do without it, or call expertune.optimize(model, graphs=False)."
            )

    def _load(self, inputs: Sequence[Tensor]) -> None:
        for place, tensor in self._own:
            tensor.detach().copy_(inputs[place])
        for place, shared in self._shared:
            shared.load(inputs[place])

    def _try(self) -> "Tried":
        """Run once for all that is done but once, and to see which gradients there are.

        Returns:
            how the small ones leave, the numbers of the large ones, and the tensors through which those of outputs
            enter.
        """
        self._run_forward()
        self.wanted_outs = [number for number, out in enumerate(self._outs) if out.requires_grad]
        asked = [self._outs[number] for number in self.wanted_outs]
        douts = list(asked)
        for entering in self._side_by_side("in", dict(enumerate(asked))):
            entering.flat.zero_()
            for number, part in zip(entering.numbers, entering.parts, strict=True):
                douts[number] = part
        grads = {number: grad for number, grad in enumerate(self._gradients(douts)) if grad is not None}
        large = [number for number, grad in grads.items() if grad.nbytes >= _LARGE]
        small = {number: grad for number, grad in grads.items() if grad.nbytes < _LARGE}
        self._forget()
        return self._side_by_side("out", small), large, douts

    def _forget(self) -> None:
        """Drop what a run has built: autograd keeps the stream that it was on, and the recording is made on another."""
        self._outs, self._large, self._postponed = [], [], []

    def _side_by_side(self, purpose: str, tensors: dict[int, Tensor]) -> list["Buffered"]:
        """Room for such tensors in buffers that recordings share, one a dtype."""
        by_dtype: defaultdict[torch.dtype, dict[int, Tensor]] = defaultdict(dict)
        for number, tensor in tensors.items():
            by_dtype[tensor.dtype][number] = tensor
        rooms = []
        for alike in by_dtype.values():
            each = list(alike.values())
            flat = self._pool.buffer(purpose, sum(tensor.numel() for tensor in each), each[0])
            rooms.append(Buffered.of(alike, flat))
        return rooms

    def _run_forward(self) -> None:
        outs: list[Tensor] = []
        with torch.enable_grad(), self._preparation.during():
            self._rest = take_apart(self._call(self._tensors, self._leaves), outs)
        self._outs = outs

    def _run_both(self) -> None:
        self._run_forward()
        self._run_backward()

    def _run_backward(self) -> None:
        grads = self._gradients(self._douts)
        for leaving in self._leaving:
            torch.cat([cast(Tensor, grads[number]).reshape(-1) for number in leaving.numbers], out=leaving.flat)
        self._large = [cast(Tensor, grads[number]).contiguous() for number in self._numbers_of_large]
        self._postponed = [
            replace(each, made=[None if x is None else x.contiguous() for x in each.made]) for each in self._postponed
        ]

    def _lend(self, postponed: Postponed) -> Postponed:
        """The same, without keeping what backward has made: other recordings may use its memory."""
        lend = self._pool.capture.lend
        return replace(postponed, made=[None if x is None else lend(x) for x in postponed.made])

    def _gradients(self, douts: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of the inputs that want one and of the parameters; None where there is none, or it is postponed."""
        asked = [self._outs[number] for number in self.wanted_outs]
        wanted = [*(tensor for _, tensor in self._own), *self._leaves]
        with accumulate.postponing(self._large_leaves) as self._postponed:
            return torch.autograd.grad(asked, wanted, douts, retain_graph=True, allow_unused=True)


Tried: TypeAlias = tuple[list["Buffered"], list[int], list[Tensor]]


class Own(NamedTuple):
    """The copy of an input that wants a gradient."""

    place: int
    tensor: Tensor


class Buffered(NamedTuple):
    """Tensors of one dtype, side by side in one buffer, in which they leave a graph or enter it."""

    numbers: list[int]
    flat: Tensor
    parts: list[Tensor]

    @classmethod
    def of(cls, tensors: dict[int, Tensor], flat: Tensor) -> "Buffered":
        """Room in `flat` for such tensors, by their numbers."""
        parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
        shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors.values(), strict=True)]
        return cls(list(tensors), flat, shaped)

    def copy(self) -> tuple[Tensor, ...]:
        """What they hold now, in memory of its own."""
        copies: tuple[Tensor, ...] = _unflatten_dense_tensors(self.flat.clone(), self.parts)  # type: ignore[no-untyped-call]
        return copies


class _Pass:
    """A forward whose backward is to come."""


class _Replay(torch.autograd.Function):
    """Arguments: the recording, how many inputs, the inputs, the parameters."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, ctx.begun = recording.forward(tensors[:num_inputs])
        if recording.keeps:
            ctx.versions = recording.versions()
        else:
            ctx.save_for_backward(*tensors[:num_inputs])
        ctx.recording, ctx.num_inputs = recording, num_inputs
        wanted = recording.wanted_outs
        ctx.mark_non_differentiable(*[out for number, out in enumerate(outs) if number not in wanted])
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        if recording.keeps and recording.versions() != ctx.versions:  # torch looks at what it has saved itself
            raise RuntimeError(
                "a parameter needed for gradient computation has been modified by an inplace operation since the "
                "forward that is differentiated, as by a step of an optimizer. Call backward before it."
            )
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        asked = [douts[i] for i in recording.wanted_outs]
        begun = ctx.begun if recording.keeps else ctx.saved_tensors
        with accumulate.sums(ctx, recording.added) as sums:
            grads = iter(recording.backward(begun, asked, sums, is_last=is_last))
        of_inputs: list[Tensor | None] = [None] * ctx.num_inputs
        for place in recording.wants:
            of_inputs[place] = next(grads)
        return None, None, *of_inputs, *grads
