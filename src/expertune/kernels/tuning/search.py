"""Search: each candidate is run on fresh inputs, compared with plain torch, and only then timed.

A configuration that is wrong, does not compile or runs out of resources is disqualified, whatever its speed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from expertune.kernels.tuning.configs import Config
from expertune.kernels.tuning.jobs import Job

# A candidate must save this share of the time: medians of one kernel differ by 1 % from run to run.
_WORTH = 0.02
# What a sum in another order may differ by, of the results' root mean square; a step left out differs by far more.
_SLACK = 1e-3

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of a candidate.

    Args:
        config: the candidate.
        time_us: median time, in microseconds; infinite where it was disqualified.
        disqualified: why, in words.
    """

    config: Config
    time_us: float = float("inf")
    disqualified: str | None = None


def search(job: Job, candidates: Sequence[Config], timer: Timer) -> Iterator[Trial]:
    """One trial a candidate, in their order.

    Args:
        job: the kernel on fixed inputs.
        candidates: what to try.
        timer: the time of a call, in microseconds.

    Raises:
        torch.AcceleratorError: a candidate took the device down, and every later call with it.
    """
    for config in candidates:
        yield _trial(job, config, timer)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial; the first where none is faster by more than noise; None where all were disqualified."""
    fastest = min(trials, key=lambda trial: trial.time_us)
    if fastest.disqualified is not None:
        return None
    return fastest if fastest.time_us < (1 - _WORTH) * trials[0].time_us else trials[0]


def median_us(run: Callable[[], object]) -> float:
    """The median time of a call, in microseconds: on a GPU with its L2 cache flushed before each, else of three."""
    if torch.cuda.is_available():
        return 1000 * float(triton.testing.do_bench(run, warmup=10, rep=100, return_mode="median"))
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return 1e6 * sorted(times_s)[1]


def _trial(job: Job, config: Config, timer: Timer) -> Trial:
    try:
        if reason := _why_wrong(job, config):
            return Trial(config=config, disqualified=reason)
        return Trial(config=config, time_us=timer(lambda: job.run(config)))
    except torch.AcceleratorError:
        raise
    except (TritonError, RuntimeError) as error:  # RuntimeError: from Triton's passes
        return Trial(config=config, disqualified=" ".join(str(error).split())[:200])


def _why_wrong(job: Job, config: Config) -> str | None:
    with _poisoned():
        results = job.run(config)
    for result, expected in zip(results, job.expected, strict=True):
        if wrong := _num_wrong(result, expected):
            return f"{wrong} of {result.numel()} numbers are wrong"
    return None


def _num_wrong(result: Tensor, expected: Tensor) -> int:
    """How many numbers differ by more than one rounding and another order of the sum. NaN is wrong."""
    slack = _SLACK * expected.square().mean().sqrt()
    is_right = (result.float() - expected).abs() <= torch.finfo(result.dtype).eps * expected.abs() + slack
    return result.numel() - int(is_right.sum())


@contextmanager
def _poisoned() -> Iterator[None]:
    """What is allocated and not written reads NaN: torch fills it so where it must be deterministic."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
