"""A recorded call whose backward runs forward again: it keeps its inputs and no memory of its own.

What gradient checkpointing does, in two graphs: forward, and forward with its backward. All layers use the same memory,
one after another, so this costs a card no more than checkpointing does, and the CPU two calls a layer. The second
forward runs the kernels of the first on the same numbers: a router chooses the same experts. It would draw other random
numbers, so a call that draws any (dropout, jitter of a router) is not recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from expertune.accumulate import Postponed
from expertune.graphs.capture import Graph
from expertune.graphs.pool import Shared
from expertune.graphs.recording import Own, Recording, Tried
from expertune.memory.random_states import RandomStates

Around: TypeAlias = Callable[[], AbstractContextManager[None]]


class Rerun(Recording):
    """Of a call. What goes in is copied before each replay, to tensors that all of these share.

    Args:
        around_again: around the second forward, whose outputs nobody reads.
        others: as for `Recording`.
    """

    keeps = False

    def __init__(self, around_again: Around, *others: Any) -> None:
        self._around_again = around_again
        super().__init__(*others)

    def may_begin(self, _inputs: Sequence[Tensor]) -> bool:
        """Always: no later replay reads what an earlier one left."""
        return True

    def _places(self, inputs: Sequence[Tensor]) -> tuple[list[Own], list[tuple[int, Shared]]]:
        wanted = {place: x for place, x in enumerate(inputs) if x.requires_grad}
        own = [
            Own(place, part.detach().requires_grad_())
            for room in self._side_by_side("inputs", wanted)
            for place, part in zip(room.numbers, room.parts, strict=True)
        ]
        others = [(place, x) for place, x in enumerate(inputs) if not x.requires_grad]
        return sorted(own, key=lambda each: each.place), [(i, self._pool.shared(x, is_passing=True)) for i, x in others]

    def _capture(self) -> tuple[Graph, Graph]:
        capture = self._pool.capture
        forward = capture.record(self._run_forward, keeps=False)
        outs = self._outs = [capture.lend(out) for out in self._outs]  # what made them goes, before it is made again
        both = capture.record(self._run_both, keeps=False)
        self._outs = outs
        return forward, both

    def _begin(self) -> None:
        """Nothing waits in the recording for a backward."""

    def _take_up(self, begun: Sequence[Tensor]) -> None:
        self._load(begun)

    def _run_forward(self) -> None:
        super()._run_forward()
        self._outs = [out.contiguous() for out in self._outs]

    def _run_again(self) -> None:
        with self._around_again():
            self._run_forward()

    def _run_both(self) -> None:
        self._run_again()
        self._run_backward()

    def _try(self) -> Tried:
        with _drawing_nothing(self._tensors):
            self._run_again()
        return super()._try()

    def _lend(self, postponed: Postponed) -> Postponed:
        """The same of what forward has made, but for weights that a host laid out otherwise and nobody writes to."""
        lend = self._pool.capture.lend
        saved = [x if x is None or not x.is_contiguous() else lend(x) for x in postponed.saved]
        return replace(super()._lend(postponed), saved=saved)


@contextmanager
def _drawing_nothing(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Around work on these inputs that draws no random numbers.

    Raises:
        RuntimeError: it did. What is drawn next is what would have been.
    """
    before = RandomStates.now(inputs)
    yield
    if not before.are_as(RandomStates.now(inputs)):
        before.restore()
        raise RuntimeError("it draws random numbers, which a second forward would draw anew")
