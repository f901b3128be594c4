"""The planner on a device of made-up memory: what it lets layers keep, and never more than there is."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertune.memory.checkpoint import checkpoint_layer
from expertune.memory.planner import LayerPlan, Planner
from expertune.memory.replay import RoutingReplay

CPU = torch.device("cpu")
LAYERS, WEIGHTS, INPUT, KEPT, WORK = 6, 1000, 1, 10, 30  # bytes; of a layer and token, but for the weights


class _Device:
    """Counts what a step of a model would allocate."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.now = self.most = WEIGHTS

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def free(self) -> int:
        return self.total - self.now

    def take(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)
        assert self.most <= self.total, "out of memory"

    @contextmanager
    def working(self, num_bytes: int) -> Iterator[None]:
        self.take(num_bytes)
        yield
        self.now -= num_bytes


def step(planner: Planner, device: _Device, tokens: int) -> list[int]:
    """One step as layers run it; the layers that kept."""
    kept = []
    for layer in range(LAYERS):
        with device.working(WORK * tokens):
            if planner.keeps(layer, tokens, CPU):
                kept.append(layer)
        device.take((KEPT if layer in kept else INPUT) * tokens)
    for layer in reversed(range(LAYERS)):
        if layer not in kept:
            with planner.running_again(layer, tokens, CPU):
                device.take(KEPT * tokens)
            device.now -= KEPT * tokens
        with device.working(WORK * tokens):
            device.now -= (KEPT if layer in kept else INPUT) * tokens
    assert device.now == WEIGHTS
    return kept


def planner(device: _Device | None) -> Planner:
    return Planner(lambda _: device)


def test_with_room_for_all_only_the_first_step_runs_twice() -> None:
    device = _Device(total=10**9)
    plan = planner(device)
    assert step(plan, device, 100) == []
    assert step(plan, device, 100) == list(range(LAYERS))
    assert step(plan, device, 50) == list(range(LAYERS))


def test_the_last_layers_keep_as_far_as_they_fit() -> None:
    sizes = []
    for total in range(5000, 13000, 500):
        device = _Device(total)
        plan = planner(device)
        step(plan, device, 100)
        kept = step(plan, device, 100)
        assert kept == list(range(LAYERS))[LAYERS - len(kept) :]
        sizes.append(len(kept))
    assert sizes[0] == 0
    assert sizes[-1] == LAYERS
    assert sizes == sorted(sizes)
    assert set(sizes) >= {0, 2, 4, 6}


def test_more_tokens_than_ever_are_planned_anew() -> None:
    device = _Device(total=10**9)
    plan = planner(device)
    step(plan, device, 100)
    assert len(step(plan, device, 100)) == LAYERS
    assert step(plan, device, 101) == []
    assert len(step(plan, device, 101)) == LAYERS


def test_what_lies_on_the_device_meanwhile_counts() -> None:
    device = _Device(total=20000)
    plan = planner(device)
    step(plan, device, 100)
    assert len(step(plan, device, 100)) == LAYERS
    device.total, device.most = 8000, device.now
    assert len(step(plan, device, 100)) < LAYERS


def test_a_device_that_is_not_counted_keeps_nothing() -> None:
    plan = planner(None)
    for _ in range(2):
        assert not any(plan.keeps(layer, 100, CPU) for layer in range(LAYERS))
        with plan.running_again(0, 100, CPU):
            pass
    assert not Planner().keeps(0, 100, CPU), "the memory of a CPU is not counted"


@pytest.mark.parametrize("kept", [False, True])
def test_a_kept_layer_runs_once_and_gives_the_same_gradient(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Planner()
    monkeypatch.setattr(plan, "keeps", lambda *_: kept)
    runs = []

    def layer(x: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        return x.sin()

    x = torch.ones(2, 3, requires_grad=True)
    RoutingReplay().wrap(checkpoint_layer, plan=LayerPlan(plan, 0, nn.Module()))(layer, x).sum().backward()
    assert runs == ([True] if kept else [False, True])
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_a_layer_allocates_is_noted_under_both_of_torchs_checkpoints(use_reentrant: bool) -> None:
    plan = planner(_Device(total=10**9))
    runs = []

    def layer(x: Tensor) -> Tensor:
        runs.append(x)
        return x.sin()

    x = torch.ones(2, 3, requires_grad=True)
    wrapped = RoutingReplay().wrap(
        partial(checkpoint, use_reentrant=use_reentrant), plan=LayerPlan(plan, 0, nn.Module())
    )
    for _ in range(2):
        wrapped(layer, x).sum().backward()
    assert len(runs) == 3  # twice in the first step, once in the second


def test_a_layer_counts_where_its_weights_lie() -> None:
    """Its input comes from the layer before, which may lie on another device; a hook moves it when the layer runs."""
    asked: list[torch.device] = []

    def meter_of(device: torch.device) -> None:
        asked.append(device)

    x = torch.empty(1, 100, 2, device="meta")
    for layer in (nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.Identity()):
        plan = LayerPlan(Planner(meter_of), 0, layer)
        plan.keeps(x)
        with plan.running_again(x):
            pass
    offloaded = without_weights = x.device
    assert asked == [CPU, offloaded, without_weights]
