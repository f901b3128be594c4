"""Work set aside: given to the device on a stream of its own, where nobody waits for it but who needs its result.

A trainer reads its metrics between forward and backward. It waits for all that the current stream has been given, and
then the device waits for it, until backward has been submitted. What only backward needs may fill that time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

_held: ContextVar["list[Aside] | None"] = ContextVar("_held", default=None)


class Aside:
    """Some work on a CUDA device.

    Args:
        work: what is submitted, once.
        tensors: what it reads and writes, of memory of the stream that is current now, which may be freed any time.
    """

    def __init__(self, work: Callable[[], object], tensors: Sequence[Tensor]) -> None:
        self._rest: tuple[Callable[[], object], Sequence[Tensor]] | None = (work, tensors)
        self._end: torch.cuda.Event | None = None

    def submit(self) -> None:
        """Behind what the current stream has been given so far; a second time does nothing."""
        if self._rest is None:
            return
        work, tensors = self._rest
        stream = _stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            work()
        for x in tensors:
            x.record_stream(stream)
        self._end, self._rest = stream.record_event(), None

    def wait(self) -> None:
        """Let what the current stream is given from now on begin when the work is done."""
        self.submit()
        if self._end is not None:
            self._end.wait()


def set_aside(work: Callable[[], object], tensors: Sequence[Tensor]) -> Aside | None:
    """Submit work to a stream of its own, or let `held` do it; None if it has been done where all else is.

    Args:
        work: of these tensors alone.
        tensors: what it reads and writes. Nobody writes to them until they have waited.
    """
    device = tensors[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        work()
        return None
    aside, waiting = Aside(work, tensors), _held.get()
    if waiting is None:
        aside.submit()
    else:
        waiting.append(aside)
    return aside


@contextmanager
def held() -> Iterator[None]:
    """Submit at the end what is set aside within: a large kernel leaves none that comes after it room to run beside."""
    waiting: list[Aside] = []
    token = _held.set(waiting)
    try:
        yield
    finally:
        _held.reset(token)
    for aside in waiting:
        aside.submit()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
