"""Work set aside: where nobody waits for it, its result is there when it is waited for, and its memory is its own."""

from functools import partial

import pytest
import torch
from torch import Tensor

from expertune.aside import held, set_aside
from tests.cases import DEVICE

LONG = 200_000_000  # cycles of a GPU, a tenth of a second
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has streams")


def slow_copy(source: Tensor, out: Tensor) -> None:
    torch.cuda._sleep(LONG)
    out.copy_(source)


def test_without_streams_it_is_done_at_once() -> None:
    out = torch.zeros(3)
    with held():
        assert set_aside(partial(out.fill_, 1.0), [out]) is None
        assert out.tolist() == [1.0, 1.0, 1.0]


@on_a_gpu
def test_who_waits_for_the_current_stream_does_not_wait_for_it() -> None:
    x, out = torch.ones(1000, device=DEVICE), torch.zeros(1000, device=DEVICE)
    aside = set_aside(partial(slow_copy, x, out), [x, out])
    assert aside is not None and aside._end is not None
    torch.cuda.current_stream().synchronize()
    assert not aside._end.query()
    aside.wait()
    assert torch.equal(out, x)


@on_a_gpu
def test_it_reads_what_was_written_before() -> None:
    x, out = torch.zeros(1000, device=DEVICE), torch.zeros(1000, device=DEVICE)
    torch.cuda._sleep(LONG)
    x.fill_(2.0)
    aside = set_aside(partial(out.copy_, x), [x, out])
    assert aside is not None
    aside.wait()
    assert (out == 2).all()


@on_a_gpu
def test_what_is_held_begins_at_the_end_or_when_it_is_waited_for() -> None:
    out = torch.zeros(2, 10, device=DEVICE)
    with held():
        first, second = (set_aside(partial(row.fill_, 1.0), [row]) for row in out)
        assert first is not None and second is not None
        torch.cuda.synchronize()
        assert (out == 0).all()
        first.wait()
        torch.cuda.synchronize()
        assert out.sum(1).tolist() == [10.0, 0.0]
    torch.cuda.synchronize()
    assert (out == 1).all()


@on_a_gpu
def test_memory_that_is_given_back_meanwhile_is_not_written_to() -> None:
    out = torch.zeros(2**20, device=DEVICE)
    x = torch.ones(2**20, device=DEVICE)
    aside = set_aside(partial(slow_copy, x, out), [x, out])
    assert aside is not None
    del x
    others = [torch.full((2**20,), 3.0, device=DEVICE) for _ in range(8)]
    aside.wait()
    assert (out == 1).all() and all((other == 3).all() for other in others)


@on_a_gpu
def test_in_a_capture_it_is_done_where_all_else_is() -> None:
    out, graph = torch.zeros(10, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert set_aside(partial(out.fill_, 1.0), [out]) is None
    graph.replay()
    assert (out == 1).all()
