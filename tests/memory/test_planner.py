"""The planner on a device of made-up memory: what it lets layers keep, and never more than there is."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expertune.memory.planner import LayerPlan, Planner, Way
from expertune.memory.replay import LayerMemory, RoutingReplay
from tests.memory.checkpoints import checkpoint_layer

CPU = torch.device("cpu")
LAYERS, WEIGHTS, INPUT, KEPT, WORK = 6, 1000, 1, 10, 30  # bytes; of a layer and token, but for the weights
LEAN_KEPT, LEAN_WORK = 2, 5  # with experts in tiles


class Device:
    """Counts what a step of a model would allocate."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.now = self.most = WEIGHTS

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def idle_part(self) -> float:
        return 0

    def free(self) -> int:
        return self.total - self.now

    def take(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)
        assert self.now <= self.total, "out of memory"

    @contextmanager
    def working(self, num_bytes: int) -> Iterator[None]:
        self.take(num_bytes)
        yield
        self.now -= num_bytes


def step(planner: Planner, device: Device, tokens: int, grads: int = 0) -> list[Way]:
    """One step as layers run it, with gradients of so many bytes; the way of each layer."""
    ways = []
    x = torch.empty(tokens, INPUT, dtype=torch.uint8)
    for layer in range(LAYERS):
        ways.append(planner.way(layer, x, CPU))
        with device.working((LEAN_WORK if ways[layer] is Way.LEAN else WORK) * tokens):
            pass
        device.take(_left(layer, ways[layer]) * tokens)
    device.take(grads)
    for layer in reversed(range(LAYERS)):
        way = ways[layer]
        come_back = INPUT * tokens if way is Way.LEAN and layer else 0
        with device.working(come_back + (LEAN_WORK if way is Way.LEAN else WORK) * tokens):
            if way is Way.RUN_AGAIN:
                with planner.running_again(layer, x, CPU):
                    device.take(KEPT * tokens)
            elif way is Way.LEAN:
                device.take(LEAN_KEPT * tokens + (INPUT * tokens if layer < LAYERS - 1 else 0))
        held = {Way.KEEP: 0, Way.RUN_AGAIN: KEPT, Way.LEAN: LEAN_KEPT + (INPUT if layer < LAYERS - 1 else 0)}[way]
        device.now -= (held + _left(layer, way)) * tokens
    device.now -= grads
    assert device.now == WEIGHTS
    return ways


def _left(layer: int, way: Way) -> int:
    """The bytes of a token that forward leaves of a layer."""
    return {Way.KEEP: KEPT, Way.RUN_AGAIN: INPUT, Way.LEAN: INPUT if layer == LAYERS - 1 else 0}[way]


def kept(planner: Planner, device: Device, tokens: int, grads: int = 0) -> list[int]:
    """The layers that keep in a step."""
    return [layer for layer, way in enumerate(step(planner, device, tokens, grads)) if way is Way.KEEP]


def planner(device: Device | None, lean_from: int = 0) -> Planner:
    made = Planner(lambda _: device, lean_from)
    for layer in range(LAYERS):
        made.layer(layer, nn.Module(), KEPT + WORK)
    return made


def test_with_room_for_all_only_the_first_step_runs_twice() -> None:
    device = Device(total=10**9)
    plan = planner(device)
    assert kept(plan, device, 100) == []
    assert kept(plan, device, 100) == list(range(LAYERS))
    assert kept(plan, device, 50) == list(range(LAYERS))


def test_the_last_layers_keep_as_far_as_they_fit() -> None:
    sizes = []
    for total in range(5000, 13000, 500):
        device = Device(total)
        plan = planner(device)
        step(plan, device, 100)
        layers = kept(plan, device, 100)
        assert layers == list(range(LAYERS))[LAYERS - len(layers) :]
        sizes.append(len(layers))
    assert sizes[0] == 0
    assert sizes[-1] == LAYERS
    assert sizes == sorted(sizes)
    assert set(sizes) >= {0, 2, 4, 6}


def test_layers_that_hold_memory_already_keep_wherever_the_rest_of_the_step_fits() -> None:
    def planned(total: int, held: tuple[int, ...], tokens: int) -> list[int]:
        device = Device(total)
        plan = planner(device)
        for layer in held:
            plan.layer(layer, nn.Module(), KEPT + WORK, lambda tokens: tokens == 100)
        step(plan, device, 100)
        x = torch.empty(tokens, INPUT, dtype=torch.uint8)
        return [layer for layer in range(LAYERS) if plan.way(layer, x, CPU) is Way.KEEP]

    assert planned(8000, (), 100) == [4, 5]
    assert planned(8000, (0, 1), 100) == [0, 1, 4, 5]
    assert planned(8000, (0, 5), 100) == [0, 3, 4, 5]
    assert planned(8000, (0, 1), 99) == planned(8000, (), 99) == [4, 5]
    assert planned(4000, (0, 1), 100) == [], "the rest of the step does not fit"


def test_more_tokens_than_ever_are_planned_anew() -> None:
    device = Device(total=10**9)
    plan = planner(device)
    step(plan, device, 100)
    assert len(kept(plan, device, 100)) == LAYERS
    assert kept(plan, device, 101) == []
    assert len(kept(plan, device, 101)) == LAYERS


def test_what_lies_on_the_device_meanwhile_counts() -> None:
    device = Device(total=20000)
    plan = planner(device)
    step(plan, device, 100)
    assert len(kept(plan, device, 100)) == LAYERS
    device.total, device.most = 8000, device.now
    assert len(kept(plan, device, 100)) < LAYERS


def test_a_device_that_is_not_counted_keeps_nothing() -> None:
    plan = planner(None)
    for _ in range(2):
        assert {plan.way(layer, torch.empty(100, 1), CPU) for layer in range(LAYERS)} == {Way.RUN_AGAIN}
        with plan.running_again(0, torch.empty(100, 1), CPU):
            pass
    assert Planner().way(0, torch.empty(100, 1), CPU) is Way.RUN_AGAIN, "the memory of a CPU is not counted"


@pytest.mark.parametrize("way", Way)
def test_a_kept_layer_runs_once_and_gives_the_same_gradient(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Planner()
    monkeypatch.setattr(plan, "way", lambda *_: way)
    runs = []

    def layer(x: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        return x.sin()

    x = torch.ones(2, 3, requires_grad=True)
    RoutingReplay().wrap(checkpoint_layer, memory=LayerMemory(LayerPlan(plan, 0, nn.Module())))(
        layer, x
    ).sum().backward()
    assert runs == ([True] if way is Way.KEEP else [False, True])
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_a_layer_allocates_is_noted_under_both_of_torchs_checkpoints(use_reentrant: bool) -> None:
    plan = planner(Device(total=10**9))
    runs = []

    def layer(x: Tensor) -> Tensor:
        runs.append(x)
        return x.sin()

    x = torch.ones(2, 3, requires_grad=True)
    wrapped = RoutingReplay().wrap(
        partial(checkpoint, use_reentrant=use_reentrant), memory=LayerMemory(LayerPlan(plan, 0, nn.Module()))
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
        plan.way(x)
        with plan.running_again(x):
            pass
    offloaded = without_weights = x.device
    assert asked == [CPU, offloaded, without_weights]
