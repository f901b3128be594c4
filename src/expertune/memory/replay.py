"""Routing replay: under gradient checkpointing, the recomputed forward routes each token as the first one did.

A router chooses by `topk`. Computed twice, near ties can fall the other way, and the gradient is then another
function's. So the first run of a checkpointed layer records the indices of every `topk` inside its MoE block, and the
second run reads them back; the values are gathered at the same indices, with gradient. Both runs call the same
operations, so what autograd saves matches too.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertune.memory.leave_out import LeaveOut
from expertune.memory.planner import LayerPlan

_Made = TypeVar("_Made")
Moving: TypeAlias = Callable[[Tensor], AbstractContextManager[None]]


class Tape:
    """The choices of one run of one checkpointed layer, and what was made of them."""

    def __init__(self, leave_out: LeaveOut) -> None:
        self.is_recorded = False
        self.leave_out = leave_out
        self._is_reentrant = False
        self._indices: list[Tensor] = []
        self._cursor = 0
        self._made: list[Any] = []
        self._num_made = 0

    def topk(self, function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`topk` of `x`, by the recorded indices once there are any."""
        if self.is_recorded:
            index = self._indices[self._cursor]
        else:
            index = function(x.detach(), *args, **kwargs)[1]
            self._indices.append(index)
        self._cursor += 1
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return torch.return_types.topk((x.gather(dim, index), index))

    def once(self, make: Callable[[], _Made]) -> _Made:
        """What `make` yields from the chosen experts; the second run gets, in order, what the first one made."""
        self._num_made += 1
        if self.is_recorded and self._indices:  # a router that chose without `topk` may have chosen anew
            return cast(_Made, self._made[self._num_made - 1])
        made = make()
        self._made.append(made)
        return made

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer: for the first time, or again."""
        if self.is_recorded and self._is_reentrant and torch.is_grad_enabled():
            return self.leave_out.rerun(self._from_start, function, *args, **kwargs)
        if not self.is_recorded:
            self._is_reentrant = not torch.is_grad_enabled()
        return self._from_start(function, *args, **kwargs)

    def _from_start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._cursor = self._num_made = 0
        out = function(*args, **kwargs)
        self.is_recorded = True
        return out


class _TopKMode(TorchFunctionMode):
    """Sends every `topk` to a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            return self._tape.topk(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class RoutingReplay:
    """Which tape is running, per thread (autograd recomputes in a thread of its own). One object a model."""

    def __init__(self) -> None:
        self._tapes: dict[int, Tape] = {}
        self._modes: dict[int, _TopKMode] = {}

    def wrap(
        self,
        checkpoint: Callable[..., Any],
        host: Callable[..., Any] | None = None,
        plan: LayerPlan | None = None,
        moving: Moving | None = None,
    ) -> "ReplayingCheckpoint":
        """A checkpoint function, with a tape around each run of a layer and its second one.

        Args:
            checkpoint: as torch's.
            host: the one it stands in for.
            plan: says whether the layer is checkpointed at all.
            moving: around the checkpointed call, given its input: moves what is saved of it.
        """
        return ReplayingCheckpoint(self, checkpoint, host or checkpoint, plan, moving)

    @contextmanager
    def using(self, tape: Tape) -> Iterator[None]:
        """Make `tape` the one that MoE blocks of this thread write to or read from."""
        thread = threading.get_ident()
        outer = self._tapes.get(thread)
        self._tapes[thread] = tape
        try:
            yield
        finally:
            if outer is None:
                del self._tapes[thread]
            else:
                self._tapes[thread] = outer

    @property
    def tape(self) -> Tape | None:
        """The one that runs in this thread."""
        return self._tapes.get(threading.get_ident())

    def enter_block(self) -> None:
        """At the start of a MoE block: catch its `topk`, if a tape is running."""
        if torch.compiler.is_compiling():
            return
        if (tape := self.tape) is not None:
            mode = _TopKMode(tape)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._modes[threading.get_ident()] = mode

    def leave_block(self) -> None:
        """Once a MoE block has routed, and at its end, also when it raised. Twice does no harm."""
        if torch.compiler.is_compiling():
            return
        if (mode := self._modes.pop(threading.get_ident(), None)) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class ReplayingCheckpoint:
    """Calls as `torch.utils.checkpoint.checkpoint` does, with one tape shared by a layer's first run and its reruns."""

    def __init__(
        self,
        replay: RoutingReplay,
        checkpoint: Callable[..., Any],
        host: Callable[..., Any],
        plan: LayerPlan | None,
        moving: Moving | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.host = host
        self._plan = plan
        self._moving = moving
        self._replay = replay
        self._leave_out = LeaveOut()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the host's checkpoint, or without one if that is the plan."""
        if torch.compiler.is_compiling():  # the compiler decides itself what runs again, and traces no tape
            return self.checkpoint(function, *args, **kwargs)
        if self._keeps(args):
            return function(*args, **kwargs)
        tape = Tape(self._leave_out)
        keywords: dict[str, Any] = {}
        if isinstance(function, partial):  # hosts bind a layer's keywords this way; the checkpoint may look at them
            function, keywords = partial(function.func, *function.args), function.keywords

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            with self._replay.using(tape), self._running_again(tape, run_args):
                return tape.run(function, *run_args, **run_kwargs)

        with nullcontext() if self._moving is None or not args else self._moving(args[0]):
            return self.checkpoint(partial(run, **keywords), *args, **kwargs)

    def _keeps(self, args: tuple[Any, ...]) -> bool:
        if self._plan is None or not args or not torch.is_grad_enabled():
            return False
        return self._plan.keeps(args[0])

    def _running_again(self, tape: Tape, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        if self._plan is None or not args or not tape.is_recorded:
            return nullcontext()
        return self._plan.running_again(args[0])
