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
