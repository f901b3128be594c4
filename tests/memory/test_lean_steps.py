"""Steps that a device is too small for, though every layer runs again: they are lean, and no other is."""

import pytest
import torch
from torch import nn

from expertune.memory.planner import Planner, Way
from tests.memory.test_planner import (
    CPU,
    INPUT,
    KEPT,
    LAYERS,
    LEAN_KEPT,
    LEAN_WORK,
    WEIGHTS,
    WORK,
    Device,
    planner,
    step,
)

LEAN = [Way.LEAN] * LAYERS
AGAIN = [Way.RUN_AGAIN] * LAYERS
KEEP = [Way.KEEP] * LAYERS
FULL = LAYERS * INPUT + KEPT + WORK  # bytes that a token of a fully checkpointed step takes
SPARSE = 3 * INPUT + LEAN_KEPT + LEAN_WORK  # of a lean one, no more


def test_a_first_step_that_would_not_fit_is_lean_and_so_are_those_after_it() -> None:
    total = WEIGHTS + 100 * FULL
    device = Device(total)
    assert step(planner(device), device, 100) == AGAIN
    device = Device(total - 1)
    plan = planner(device)
    for _ in range(3):
        assert step(plan, device, 100) == LEAN
    with pytest.raises(AssertionError, match="out of memory"):
        step(planner(device, lean_from=101), device, 100)


def test_a_batch_that_the_lean_way_spares_nothing_of_is_never_lean() -> None:
    device = Device(WEIGHTS + 100 * FULL - 1)
    assert step(planner(device, lean_from=100), device, 100) == LEAN
    plan = planner(device, lean_from=101)
    assert {plan.way(layer, torch.empty(100, 1), CPU) for layer in range(LAYERS)} == {Way.RUN_AGAIN}


def test_a_long_batch_is_lean_and_changes_nothing_for_short_ones() -> None:
    device = Device(WEIGHTS + 150 * FULL)
    plan = planner(device)
    assert step(plan, device, 100) == AGAIN
    kept = step(plan, device, 100)
    assert Way.KEEP in kept
    for tokens in (300, 200):
        assert step(plan, device, tokens) == LEAN
        assert step(plan, device, 100) == kept
    assert step(plan, device, 120) == AGAIN
    assert Way.KEEP in step(plan, device, 120)


def test_a_step_that_was_lean_without_need_is_not_so_again() -> None:
    """Gradients do not grow with the tokens: scaled to a long batch, a short one's step takes far too much."""
    grads, total = 3000, WEIGHTS + 3000 + 150 * FULL
    device = Device(total)
    plan = planner(device)
    for ways in (AGAIN, KEEP):
        assert step(plan, device, 10, grads) == ways
    assert step(plan, device, 100, grads) == LEAN
    assert step(plan, device, 100, grads) == AGAIN
    assert Way.KEEP in step(plan, device, 100, grads)


def test_a_peak_of_steps_that_kept_is_not_taken_for_a_longer_ones() -> None:
    """They fill the device as far as it goes, and a peak that did not rise says little of the step."""
    device = Device(WEIGHTS + 200 * FULL)
    plan = planner(device)
    assert step(plan, device, 100) == AGAIN
    assert Way.KEEP in step(plan, device, 100)
    assert device.most > WEIGHTS + 150 * FULL
    assert step(plan, device, 105) == step(plan, device, 190) == AGAIN
    assert step(plan, device, 201) == LEAN


def test_what_comes_to_lie_on_the_device_makes_steps_lean() -> None:
    """As the moments of an optimizer, after the first step."""
    device = Device(WEIGHTS + 200 * FULL)
    plan = planner(device)
    assert step(plan, device, 100) == AGAIN
    device.total -= 101 * FULL
    assert step(plan, device, 100) == LEAN
    device.total += 101 * FULL
    assert Way.KEEP in step(plan, device, 100)


@pytest.mark.parametrize("lengths", [[100, 60, 300, 300, 100, 200, 300], [300, 100, 100, 250], [50, 75, 110, 165, 250]])
def test_what_fits_when_every_step_is_lean_fits(lengths: list[int]) -> None:
    """Whatever the device's size; from one end of sizes to the other some steps turn from lean to plain."""
    least = WEIGHTS + max(lengths) * SPARSE
    num_lean = []
    for total in range(least, WEIGHTS + 2 * max(lengths) * FULL, 501):
        device = Device(total)
        plan = planner(device)
        steps = [step(plan, device, tokens) for tokens in lengths]
        assert all(ways == LEAN or Way.LEAN not in ways for ways in steps)
        num_lean.append(steps.count(LEAN))
    assert num_lean[0] > 0
    assert num_lean[-1] == 0


def test_micro_batches_are_each_planned_and_come_out_alike_each_time() -> None:
    """Gradients of the first lie there while the second runs."""

    def train() -> list[list[Way]]:
        device = Device(WEIGHTS + 1000 + 105 * FULL)
        plan, ways = planner(device), []
        for _ in range(4):
            ways.append(step(plan, device, 80))
            device.total -= 1000
            ways.append(step(plan, device, 100))
            device.total += 1000
        return ways

    ways = train()
    assert ways == train()
    assert all(each == LEAN or Way.LEAN not in each for each in ways)


def test_a_device_counts_the_layers_that_lie_there() -> None:
    """Of six layers four compute on the CPU, two where their input is."""
    x = torch.empty(100, 2, device="meta", dtype=torch.uint8)
    on_cpu = 100 * (4 * 2 + 9)
    for total, way in ((on_cpu, Way.RUN_AGAIN), (on_cpu - 1, Way.LEAN)):
        devices = {CPU: Device(WEIGHTS + total), x.device: Device(WEIGHTS + 100 * (2 * 2 + 30))}
        plan = Planner(devices.get)
        plans = [plan.layer(n, nn.Linear(1, 1) if n < 4 else nn.Module(), 9 if n < 4 else 30) for n in range(6)]
        assert [each.way(x) for each in plans] == [way] * 4 + [Way.RUN_AGAIN] * 2
