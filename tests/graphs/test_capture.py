"""Recording on a device."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.graphs import capture as capturing
from expertune.graphs.capture import CudaCapture
from tests.cases import needs_cuda
from tests.graphs.replayed import Waits


@needs_cuda
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_an_error_within_leaves_the_process_able_to_go_on(error: type[BaseException]) -> None:
    """A stream that still captures would fail every later call, and Ctrl-C in a notebook ends no process."""
    capture = CudaCapture(torch.device("cuda"))
    x = torch.zeros(4, device="cuda")

    def work(raised: type[BaseException] | None = None) -> None:
        x.add_(1)
        if raised is not None:
            raise raised

    with pytest.raises(error):
        capture.record(partial(work, error), keeps=True)
    assert x.tolist() == [0, 0, 0, 0]
    graph = capture.record(work, keeps=True)
    graph.replay()
    assert x.tolist() == [1, 1, 1, 1]


@needs_cuda
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_work_that_waits_is_refused_before_it_is_recorded(where: str) -> None:
    """A stream that had captured it would leave the generator of random numbers as if it captured for ever."""
    capture, x = CudaCapture(torch.device("cuda")), torch.ones(4, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="waits for the device"), capture.refusing_waits():
        torch.autograd.grad(Waits.apply(x, where).sum(), x)  # type: ignore[no-untyped-call]
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.rand(4, device="cuda").sum().item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_thread_of_backward_is_known(device: str) -> None:
    """What Python waits for there torch tells there, and not in the thread that called backward."""
    seen, x = [], torch.ones(4, device=device, requires_grad=True)

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(_: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(threading.get_ident())
            return dy

    torch.autograd.grad(Noting.apply(x).sum(), x)  # type: ignore[no-untyped-call]
    assert seen == [capturing.backwards_thread(torch.device(device))]


@needs_cuda
def test_another_thread_may_wait_meanwhile() -> None:
    capture, x = CudaCapture(torch.device("cuda")), torch.ones(4, device="cuda")
    with capture.refusing_waits(), ThreadPoolExecutor(1) as pool:
        y = x * 2
        assert pool.submit(lambda: x.sum().item()).result() == 4
    assert y.tolist() == [2] * 4


def test_of_warnings_those_of_waits_in_these_threads_are_taken() -> None:
    waits: list[Any] = []
    with pytest.warns(UserWarning) as shown, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = capturing._collecting(waits, warnings.showwarning, [threading.get_ident()])
        warnings.warn(f"{capturing._WAITS} (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(warnings.warn, capturing._WAITS).result()
    assert [str(each) for each in waits] == [f"{capturing._WAITS} (Triggered internally)"]
    assert [str(each.message) for each in shown] == ["another", capturing._WAITS]


@needs_cuda
def test_memory_of_graphs_that_are_gone_is_not_asked_for_again() -> None:
    capture = CudaCapture(torch.device("cuda"))
    x = torch.zeros(4, device="cuda")
    held = []
    for _ in range(3):
        graph = capture.record(lambda: held.append(x + 1), keeps=True)
        graph.replay()
        del graph
    assert [each.tolist() for each in held] == [[1] * 4] * 3
