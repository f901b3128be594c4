"""Work recorded into a CUDA graph: submitted once, run again by one call with the same addresses."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Run it again, on the current stream."""
        ...


class Capture(Protocol):
    """A way to record work."""

    def record(self, work: Callable[[], None], *, keeps: bool) -> Graph:
        """Record work, without running it.

        Args:
            work: launches kernels and waits for nothing; has run once before, so that what is done but once is done.
            keeps: whether what it allocates outlives it; otherwise other recordings may be given the same memory.

        Raises:
            RuntimeError: it waits for the device, or there is no memory.
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
        self._kept, self._passing = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None], *, keeps: bool) -> Graph:
        """Other threads may allocate meanwhile, as those of data loaders do."""
        return self._record(work, self._kept if keeps else self._passing)

    def record_alone(self, work: Callable[[], None]) -> Graph:
        """In a pool of its own."""
        return self._record(work, torch.cuda.graph_pool_handle())

    def _record(self, work: Callable[[], None], pool: Any) -> Graph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _no_collection():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
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
