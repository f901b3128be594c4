"""Recording on a device."""

from functools import partial

import pytest
import torch

from expertune.graphs.capture import CudaCapture
from tests.cases import needs_cuda


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
def test_work_that_waits_is_refused_before_it_is_recorded() -> None:
    """A stream that had captured it would leave the generator of random numbers as if it captured for ever."""
    capture = CudaCapture(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="synchronizing"), capture.refusing_waits():
        torch.zeros(4, device="cuda").sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.rand(4, device="cuda").sum().item()


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
