"""The search: only what is right is timed, and only what is faster by more than noise is chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from expertune.kernels.tuning.configs import LinearConfig, LinearShape, Shape, ShrinkShape
from expertune.kernels.tuning.jobs import Batch, Job, make_job
from expertune.kernels.tuning.lookup import Key
from expertune.kernels.tuning.search import Trial, best, search
from expertune.kernels.tuning.tables import candidates, shipped
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels

GOOD, OTHER = LinearConfig(32, 16, 4, 2), LinearConfig(16, 16, 4, 2)
EXPECTED = torch.randn(40, 16)


def right(dtype: torch.dtype = torch.float32) -> Tensor:
    return EXPECTED.new_empty(EXPECTED.shape).copy_(EXPECTED).to(dtype)


def changed(row: slice, value: float) -> Callable[[], Tensor]:
    def make() -> Tensor:
        result = right()
        result[row] += value
        return result

    return make


def partly_written() -> Tensor:
    result = EXPECTED.new_empty(EXPECTED.shape)
    result[:-1] = EXPECTED[:-1]
    return result


def raises(error: Exception) -> Callable[[], Tensor]:
    def make() -> Tensor:
        raise error

    return make


def trials(make: Callable[[], Tensor]) -> list[Trial]:
    """A search of which the second candidate makes such a result, in no time."""
    job = Job(run=lambda config: ((right() if config == GOOD else make()),), expected=(EXPECTED,))
    timed = []

    def timer(run: Callable[[], Any]) -> float:
        timed.append(run)
        return 100.0 if len(timed) == 1 else 1.0

    found = list(search(job, [GOOD, OTHER], timer))
    assert [trial.config for trial in found] == [GOOD, OTHER]
    assert len(timed) == sum(trial.disqualified is None for trial in found), "what is wrong is not timed"
    return found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (changed(slice(7, 8), 0.1), "16 of 640 numbers are wrong"),
        (partly_written, "16 of 640 numbers are wrong"),
        (changed(slice(0, 1), float("nan")), "16 of 640"),
        (changed(slice(0, 1), float("inf")), "16 of 640"),
        (raises(OutOfResources(300_000, 232_448, "shared memory")), "shared memory"),
        (raises(RuntimeError("PassManager::run failed")), "PassManager::run failed"),
    ],
)
def test_a_candidate_that_is_wrong_or_fails_is_disqualified(make: Callable[[], Tensor], words: str) -> None:
    found = trials(make)
    assert found[1].disqualified is not None
    assert words in found[1].disqualified
    assert best(found) == found[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_candidate_that_is_right_and_faster_is_chosen() -> None:
    found = trials(right)
    assert best(found) == found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding_is_right(dtype: torch.dtype) -> None:
    assert trials(lambda: right(dtype))[1].disqualified is None


def test_a_device_that_is_gone_ends_the_search() -> None:
    with pytest.raises(torch.AcceleratorError):
        trials(raises(torch.AcceleratorError("an illegal memory access was encountered")))


def test_what_a_bug_of_ours_raises_is_not_swallowed() -> None:
    with pytest.raises(AssertionError):
        trials(raises(AssertionError("weights and factors lie along different dimensions")))


def test_noise_does_not_replace_the_present_one_and_its_failure_does() -> None:
    present, faster = Trial(config=GOOD, time_us=100.0), Trial(config=OTHER, time_us=99.0)
    assert best([present, faster]) == present
    wrong = Trial(config=GOOD, disqualified="wrong")
    assert best([wrong, faster]) == faster
    assert best([wrong, wrong]) is None


@needs_kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        LinearShape(72, 40, 8, True),
        LinearShape(72, 40, 24, False),
        LinearShape(72, 40, 0, True),
        ShrinkShape(72, 24, True, True),
        ShrinkShape(72, 24, True, False),
        ShrinkShape(72, 8, False, False),
    ],
    ids=str,
)
def test_every_candidate_of_the_kernels_is_right(shape: Shape, dtype: torch.dtype) -> None:
    key = Key(shape, DEVICE, dtype, 32)
    job = make_job(key, Batch(num_tokens=19, top_k=2, num_experts=5))
    card = (0, 0) if DEVICE.type == "cpu" else torch.cuda.get_device_capability()
    tried = candidates(shape, card, dtype.itemsize, shipped(shape, card, dtype.itemsize, 32))
    assert [trial.disqualified for trial in search(job, tried, lambda run: 1.0)] == [None] * len(tried)
