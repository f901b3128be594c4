"""Work recorded into a CUDA graph: submitted once, run again by one call with the same addresses."""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

_WAITS = "called a synchronizing CUDA operation"  # torch's warning


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Run it again, on the current stream."""
        ...


class Capture(Protocol):
    """A way to record work."""

    def refusing_waits(self) -> AbstractContextManager[None]:
        """Around work that runs as it will be recorded: see that it waits for nothing, all done that is done but once.

        Raises:
            RuntimeError: it waits for the device.
        """
        ...

    def record(self, work: Callable[[], None], *, keeps: bool) -> Graph:
        """Record work, without running it.

        Args:
            work: launches kernels and waits for nothing, as `refusing_waits` has seen.
            keeps: whether what it allocates outlives it; otherwise other recordings may be given the same memory.

        Raises:
            RuntimeError: there is no memory, or it waits for the device all the same.
        """
        ...

    def record_alone(self, work: Callable[[], None]) -> Graph:
        """The same, with memory that no other recorded work is given: it may be replayed before or after any."""
        ...

    def make_room(self) -> None:
        """Give back to the device what the allocator holds for no tensor: work that is recorded cannot take it."""
        ...

    def lend(self, x: Tensor) -> Tensor:
        """What recorded work leaves in `x`, contiguous, to be read right after a replay.

        The memory is not kept: the next replay of other work may write there.
        """
        ...


class CudaCapture:
    """Records on a stream of its own, with two pools of memory: what forwards keep, and what backwards use in passing.

    Nothing of the second lives from one replay to the next, so every backward may use the memory of every other. Of the
    first, a forward's passing memory may be what a later one keeps: so forwards are replayed in the order in which they
    were recorded, which `Pool` sees to.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._kept, self._passing = _Memory(), _Memory()

    @contextmanager
    def refusing_waits(self) -> Iterator[None]:
        """By torch's own check, which tells of waits in warnings: other threads may wait meanwhile.

        A stream that captures would refuse a wait as well. But torch's allocator and its generator of random numbers
        are left behind as if it captured for ever.
        """
        before, waits = torch.cuda.get_sync_debug_mode(), list[Any]()
        threads = threading.get_ident(), backwards_thread(self._stream.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # that the check is a prototype
            warnings.filterwarnings("always", _WAITS)
            warnings.showwarning = _collecting(waits, warnings.showwarning, threads)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if waits:
            raise RuntimeError("it waits for the device")

    def record(self, work: Callable[[], None], *, keeps: bool) -> Graph:
        """Other threads may allocate meanwhile, as those of data loaders do."""
        return self._record(work, self._kept if keeps else self._passing)

    def record_alone(self, work: Callable[[], None]) -> Graph:
        """In a pool of its own."""
        return self._record(work, _Memory())

    def _record(self, work: Callable[[], None], memory: "_Memory") -> Graph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _no_collection():
            graph.capture_begin(pool=memory.handle(), capture_error_mode="thread_local")
            memory.graphs.add(graph)
            try:
                work()
            except BaseException:  # Ctrl-C as well: in a process whose stream still captures, every later call fails
                with suppress(RuntimeError):  # that the recording failed, which the first error says better
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return graph

    def make_room(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self._stream.device)
        torch.cuda.empty_cache()

    def lend(self, x: Tensor) -> Tensor:
        """The same memory, known by its address alone, so that the pool may give it to other recordings too."""
        at_address: Tensor = torch.as_tensor(_Address(x.data_ptr(), x.nbytes), device=x.device)
        return at_address.view(x.dtype).view(x.shape)


def backwards_thread(device: torch.device) -> int:
    """Where autograd runs what Python has written of a backward pass on this device: a thread of its own on CUDA."""
    idents: list[int] = []
    x = torch.zeros((), device=device, requires_grad=True)
    x.register_hook(lambda _: idents.append(threading.get_ident()))  # type: ignore[no-untyped-call]
    torch.autograd.grad(x * 1, x)
    return idents[0]


def _collecting(waits: list[Any], others: Callable[..., None], threads: Collection[int]) -> Callable[..., None]:
    """Takes these threads' warnings of waits, and hands on all others."""

    def show(message: Any, *where: Any, **more: Any) -> None:
        if threading.get_ident() in threads and str(message).startswith(_WAITS):
            waits.append(message)
        else:
            others(message, *where, **more)

    return show


class _Memory:
    """A pool of memory for graphs. Once none is left torch has given it up, and refuses its name."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle: Any = None

    def handle(self) -> Any:
        """Its name, a new one where there are no graphs."""
        if not self.graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


class _Address:
    """Bytes of a CUDA device, as its array interface describes them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collector that runs while work is recorded may free what ends the recording, such as another graph."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
