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
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertune.memory.leave_out import LeaveOut
from expertune.memory.planner import LayerPlan, Way
from expertune.memory.token_tiles import TokenTiles

_Made = TypeVar("_Made")
Moving: TypeAlias = Callable[[Tensor], AbstractContextManager[None]]
Again: TypeAlias = Callable[[Way, tuple[Any, ...], dict[str, Any]], AbstractContextManager[None] | None]
Forward: TypeAlias = Callable[..., Any]
Returning: TypeAlias = Callable[[Forward], tuple[Forward, Callable[[Any], Any] | None]]


class LayerMemory(NamedTuple):
    """By what one layer spares memory.

    Args:
        plan: says in which way it runs; None for the lean one in every step.
        moving: in the lean way around the checkpointed call, given its input: moves what is saved of it.
        tiles: in the lean way those into which its experts cut a long batch.
        again: around a call, given the planned way and its arguments, in place of that way: its backward then runs
            forward again by itself. Gives None where that cannot be, or would be slower.
        returning: gives a forward that returns as well what the layer's leaves elsewhere, and what puts that there and
            makes of the one's result the other's. None where nothing is left elsewhere.
    """

    plan: LayerPlan | None = None
    moving: Moving | None = None
    tiles: TokenTiles | None = None
    again: Again | None = None
    returning: Returning | None = None


class Tape:
    """The choices of one run of one checkpointed layer, what was made of them, and the tiles that both runs walk."""

    def __init__(self, leave_out: LeaveOut, tiles: TokenTiles | None = None) -> None:
        self.is_recorded = False
        self.leave_out = leave_out
        self.tiles = tiles
        self._first_built_no_graph = False
        self._indices: list[Tensor] = []
        self._cursor = 0
        self._made: list[Any] = []
        self._num_made = 0

    def topk(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`topk` of its first argument, by the recorded indices once there are any."""
        x, *args = (kwargs.pop("input"), *args) if "input" in kwargs else args  # type: ignore[assignment]
        index = self.chosen(lambda: function(x.detach(), *args, **kwargs)[1])
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return torch.return_types.topk((x.gather(dim, index), index))

    def chosen(self, choose: Callable[[], Tensor]) -> Tensor:
        """What `choose` yields, for a router that chooses without `topk`; the recorded once there is any."""
        if self.is_recorded:
            index = self._indices[self._cursor]
        else:
            index = choose()
            self._indices.append(index)
        self._cursor += 1
        return index

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
        if self.is_recorded and self._first_built_no_graph and torch.is_grad_enabled():
            return self.leave_out.rerun(self._from_start, function, *args, **kwargs)
        if not self.is_recorded:
            self._first_built_no_graph = not torch.is_grad_enabled()
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
        memory: LayerMemory | None = None,
        leave_out: LeaveOut | None = None,
    ) -> "ReplayingCheckpoint":
        """A checkpoint function, with a tape around each run of a layer and its second one.

        Args:
            checkpoint: as torch's.
            host: the one it stands in for.
            memory: by what the layer spares more, or whether it is checkpointed at all; None for neither.
            leave_out: of the layer.
        """
        return ReplayingCheckpoint(
            self, checkpoint, host or checkpoint, memory or LayerMemory(), leave_out or LeaveOut()
        )

    @contextmanager
    def using(self, tape: Tape) -> Iterator[None]:
        """Make `tape` the one that MoE blocks of this thread write to or read from."""
        thread = threading.get_ident()
        outer = self._tapes.get(thread)
        self._tapes[thread] = tape
        try:
            yield
        finally:
            self.leave_block()  # which Ctrl-C has kept from its end: torch calls hooks after errors alone
            if outer is None:
                del self._tapes[thread]
            else:
                self._tapes[thread] = outer

    @contextmanager
    def leaving_out(self, leave_out: LeaveOut) -> Iterator[None]:
        """Around a run of a layer that is followed by its backward, with the experts' output left out if it may be."""
        with self.using(Tape(leave_out)), leave_out.leaving_out():
            yield

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
        memory: LayerMemory,
        leave_out: LeaveOut,
    ) -> None:
        self.checkpoint = checkpoint
        self.host = host
        self._memory = memory
        self._replay = replay
        self._leave_out = leave_out

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the host's checkpoint, or without one if that is the plan."""
        if torch.compiler.is_compiling():  # the compiler decides itself what runs again, and traces no tape
            return self.checkpoint(function, *args, **kwargs)
        way = self._way(args)
        if (again := self._again(way, function, args, kwargs)) is not None:
            with again:
                return function(*args, **kwargs)
        if way is Way.KEEP:
            return function(*args, **kwargs)
        tape = Tape(self._leave_out, self._memory.tiles if way is Way.LEAN else None)
        keywords: dict[str, Any] = {}
        if isinstance(function, partial):  # hosts bind a layer's keywords this way; the checkpoint may look at them
            function, keywords = partial(function.func, *function.args), function.keywords
        returning = self._memory.returning
        forward, finish = (function, None) if returning is None else returning(function)

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            is_noted = way is Way.RUN_AGAIN and tape.is_recorded
            with self._replay.using(tape), self._running_again(run_args) if is_noted else nullcontext():
                return tape.run(forward, *run_args, **run_kwargs)

        with self._moving(args) if way is Way.LEAN else nullcontext():
            out = self.checkpoint(partial(run, **keywords), *args, **kwargs)
        return out if finish is None else finish(out)

    def _way(self, args: tuple[Any, ...]) -> Way:
        if self._memory.plan is None:
            return Way.LEAN
        return self._memory.plan.way(args[0]) if args and torch.is_grad_enabled() else Way.RUN_AGAIN

    def _again(
        self, way: Way, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None] | None:
        if self._memory.again is None:
            return None
        keywords = function.keywords | kwargs if isinstance(function, partial) else kwargs
        return self._memory.again(way, args, keywords)

    def _running_again(self, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        return nullcontext() if self._memory.plan is None or not args else self._memory.plan.running_again(args[0])

    def _moving(self, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        return nullcontext() if self._memory.moving is None or not args else self._memory.moving(args[0])
