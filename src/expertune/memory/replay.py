"""Routing replay: under gradient checkpointing, the recomputed forward routes each token as the first one did.

A router chooses by `topk`. Computed twice, near ties can fall the other way, and the gradient is then another
function's. So the first run of a checkpointed layer records the indices of every `topk` inside its MoE block, and the
second run reads them back; the values are gathered at the same indices, with gradient. Both runs call the same
operations, so what autograd saves matches too.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Tape:
    """The choices of one run of one checkpointed layer."""

    def __init__(self) -> None:
        self.is_recorded = False
        self._indices: list[Tensor] = []
        self._cursor = 0

    def topk(self, function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`topk` of `x`, by the recorded indices once there are any."""
        if self.is_recorded:
            index = self._indices[self._cursor]
            self._cursor += 1
        else:
            index = function(x.detach(), *args, **kwargs)[1]
            self._indices.append(index)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        return torch.return_types.topk((x.gather(dim, index), index))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around each run of the layer."""
        self._cursor = 0
        yield
        self.is_recorded = True


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

    def wrap(self, checkpoint: Callable[..., Any], host: Callable[..., Any] | None = None) -> "ReplayingCheckpoint":
        """A checkpoint function, with a tape around each layer that it runs; `host` is the one it stands in for."""
        return ReplayingCheckpoint(self, checkpoint, host or checkpoint)

    @contextmanager
    def using(self, tape: Tape) -> Iterator[None]:
        """Make `tape` the one that MoE blocks of this thread write to or read from."""
        thread = threading.get_ident()
        outer = self._tapes.get(thread)
        self._tapes[thread] = tape
        try:
            with tape.running():
                yield
        finally:
            if outer is None:
                del self._tapes[thread]
            else:
                self._tapes[thread] = outer

    def enter_block(self) -> None:
        """At the start of a MoE block: catch its `topk`, if a tape is running."""
        thread = threading.get_ident()
        if (tape := self._tapes.get(thread)) is not None:
            mode = _TopKMode(tape)
            mode.__enter__()  # type: ignore[no-untyped-call]
            self._modes[thread] = mode

    def leave_block(self) -> None:
        """Once a MoE block has routed, and at its end, also when it raised. Twice does no harm."""
        if (mode := self._modes.pop(threading.get_ident(), None)) is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class ReplayingCheckpoint:
    """Calls as `torch.utils.checkpoint.checkpoint` does, with one tape shared by a layer's first run and its reruns."""

    def __init__(self, replay: RoutingReplay, checkpoint: Callable[..., Any], host: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.host = host
        self._replay = replay

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the host's checkpoint."""
        tape = Tape()
        keywords: dict[str, Any] = {}
        if isinstance(function, partial):  # hosts bind a layer's keywords this way; the checkpoint may look at them
            function, keywords = partial(function.func, *function.args), function.keywords

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            with self._replay.using(tape):
                return function(*run_args, **run_kwargs)

        return self.checkpoint(partial(run, **keywords), *args, **kwargs)
