"""Inputs moved to pinned memory by a stream of copies: the same bits, and room for one input instead of all."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from expertune.memory.checkpoint import checkpoint_layer
from expertune.memory.offload import LEAST_TOKENS, CudaLane, Offload
from expertune.memory.replay import RoutingReplay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, WIDTH = 12, 1024
INPUT = LEAST_TOKENS * WIDTH * 2  # bytes


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).sin()


class _Model(nn.Module):
    def __init__(self, offload: Offload | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        replay = RoutingReplay()
        self.calls = [
            replay.wrap(
                checkpoint_layer,
                moving=None if offload is None else partial(offload.moving, stays=layer is self.layers[-1]),
            )
            for layer in self.layers
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        for call, layer in zip(self.calls, self.layers, strict=True):
            x = call(layer, x)
        return x

    def step(self, seed: int) -> list[Tensor]:
        """Gradients of a batch made on the device, so that nothing before it waits for the host."""
        self.zero_grad()
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(1, LEAST_TOKENS, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)
        self(x.requires_grad_()).square().mean().backward()
        return [p.grad for p in self.parameters() if p.grad is not None]


class _CountingLane(CudaLane):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.num_buffers = 0

    def buffer(self, num_bytes: int) -> Tensor:
        self.num_buffers += 1
        buffer = super().buffer(num_bytes)
        assert buffer.is_pinned()
        return buffer


def test_gradients_are_bit_equal_step_after_step() -> None:
    lane = _CountingLane(torch.device("cuda", torch.cuda.current_device()))
    plain, moved = _Model(None), _Model(Offload(lambda _: lane))
    for seed in range(5):
        truth, ours = plain.step(seed), moved.step(seed)
        assert len(ours) == len(truth) == 2 * LAYERS
        assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    assert lane.num_buffers == LAYERS - 1


def test_on_a_stream_of_the_callers_too() -> None:
    plain, moved = _Model(None).step(0), _Model(Offload())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [moved.step(0) for _ in range(2)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for ours in results for a, b in zip(ours, plain, strict=True))


def _peak(model: _Model) -> int:
    model.step(0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.step(1)
    return torch.cuda.max_memory_allocated() - before


def test_the_peak_of_a_step_falls_by_the_inputs_that_are_moved() -> None:
    kept = _peak(_Model(None))
    moved = _peak(_Model(Offload()))
    # what is saved: of all but the last layer; what is not: the one that comes back while another is used
    assert moved <= kept - (LAYERS - 3) * INPUT


def test_the_allocator_takes_no_more_than_is_allocated_though_the_host_runs_ahead() -> None:
    """Under `record_stream` the memory of every input would wait for the host, which is layers ahead."""
    model = _Model(Offload())
    model.step(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(10**9)
    model.step(1)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated() < LAYERS // 2 * INPUT


def test_forward_and_backward_wait_for_nothing_once_buffers_are_there() -> None:
    model = _Model(Offload())
    model.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
