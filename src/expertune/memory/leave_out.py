"""The experts' output is left out of a recomputed layer whose backward never reads it.

A checkpointed layer is run again for what its backward saved. The last thing that most MoE layers do is to add the
experts' output to the residual, and an addition saves nothing: so down and combine, a sixth of the experts' work under
checkpointing, need not be done again. Nothing is assumed about a host: whoever saves a tensor after the experts is
caught at it, the layer is run once more in full, and from then on always. So it is where a custom function of autograd
comes after the experts, which may keep what it reads without saving it. A layer that somebody looks into by hooks is
run in full as long as they are there.

Only where the first run builds no graph, as under our checkpoint and torch's reentrant one. Torch's other stops by
itself once all that was saved is there, and counts what is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from expertune.memory.random_states import RandomStates


class _OutputNeededError(Exception):
    """A tensor was saved after the experts' output had been left out."""


class LeaveOut:
    """What one layer has shown so far. One object a layer, kept from step to step.

    Args:
        is_watched: whether somebody looks into the layer, who is not to see zeros.
    """

    def __init__(self, is_watched: Callable[[], bool] = lambda: False) -> None:
        self._is_watched = is_watched
        self._is_right: bool | None = None  # not known before the first time
        self._guard: ExitStack | None = None
        self._left_out: list[Node] = []

    def rerun(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer again, without its experts' output as long as that is right."""
        if self._is_right is not False and not self._is_watched():
            before = RandomStates.now(args)
            try:
                with self._guarding():
                    out = function(*args, **kwargs)
                    self._check(out)
                    return out
            except _OutputNeededError:
                self._is_right = False
                before.restore()
        return function(*args, **kwargs)

    @contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Around one more run of the layer, of which the output is left out if it has shown that this is right.

        Raises:
            RuntimeError: it was not. The layer is run in full from then on.
        """
        if not self._is_right or self._is_watched():
            yield
            return
        try:
            with self._guarding():
                yield
        except _OutputNeededError:
            self._is_right = False
            raise RuntimeError("it reads the experts' output in backward, as it did not before") from None

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        """Around a run without the experts' output: whoever saves a tensor after them is caught."""
        try:
            with ExitStack() as self._guard:
                yield
        finally:
            self._guard = None
            self._left_out.clear()

    @property
    def is_on(self) -> bool:
        """Whether the experts of this run shall yield zeros."""
        return self._guard is not None

    def begin(self, out_TD: Tensor) -> None:
        """The experts have yielded zeros, `out_TD`: from here to the end of the layer, nothing may be saved."""
        if self._guard is not None:
            self._guard.enter_context(torch.autograd.graph.saved_tensors_hooks(_refuse, _refuse))
            if out_TD.grad_fn is not None:
                self._left_out.append(out_TD.grad_fn)

    def _check(self, out: Any) -> None:
        if self._is_right is None:
            outputs = out if isinstance(out, tuple | list) else (out,)
            ends = [each.grad_fn for each in outputs if isinstance(each, Tensor) and each.grad_fn is not None]
            if any(isinstance(node, BackwardCFunction) for node in _between(self._left_out, ends)):
                raise _OutputNeededError
            self._is_right = True


def _between(starts: Iterable[Node], ends: Iterable[Node]) -> set[Node]:
    """The nodes by which `ends` were made of `starts`."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    seen = set(ends)
    to_visit = list(seen)
    while to_visit:
        node = to_visit.pop()
        for made_of, _ in node.next_functions:
            if made_of is not None:
                readers[made_of].append(node)
                if made_of not in seen:
                    seen.add(made_of)
                    to_visit.append(made_of)
    found: set[Node] = set()
    to_visit = list(starts)
    while to_visit:
        new = set(readers[to_visit.pop()]) - found
        found |= new
        to_visit.extend(new)
    return found


def _refuse(_saved: Tensor) -> Tensor:
    raise _OutputNeededError
