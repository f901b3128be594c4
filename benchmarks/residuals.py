"""Whether loss curves differ from those of a reference: their residuals, step by step, and t tests of the mean."""

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MeanTest:
    """A mean and whether it differs from zero, two-sided at 95 %.

    Attributes:
        number: of observations, each taken as independent.
        mean, standard_error: of the observations, and of their mean.
        t: their ratio.
        critical_t: what |t| must pass.
    """

    number: int
    mean: float
    standard_error: float
    t: float
    critical_t: float

    @property
    def is_different(self) -> bool:
        """Whether the mean differs from zero."""
        return abs(self.t) > self.critical_t


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """Curves minus their references.

    Attributes:
        steps: the test over all steps of all seeds. Residuals of one run hang together, because a rounding early on
            lives in all later steps, so that this test finds a difference too often.
        seeds: the test over the means of the seeds, which are independent; None for a single seed.
        largest: the largest absolute residual.
    """

    steps: MeanTest
    seeds: MeanTest | None
    largest: float


def residuals(curves: list[list[float]], references: list[list[float]]) -> Residuals:
    """The residuals of curves against references of the same seeds, pair by pair and step by step.

    Raises:
        ValueError: the pairs do not have the same steps, or there are fewer than two residuals.
    """
    pairs = zip(curves, references, strict=True)
    runs = [[a - b for a, b in zip(curve, reference, strict=True)] for curve, reference in pairs]
    steps = [each for run in runs for each in run]
    return Residuals(
        steps=mean_test(steps),
        seeds=mean_test([statistics.mean(run) for run in runs]) if len(runs) > 1 else None,
        largest=max(abs(each) for each in steps),
    )


def mean_test(observations: list[float]) -> MeanTest:
    """Student's t test of the mean against zero.

    Raises:
        ValueError: there are fewer than two observations.
    """
    number = len(observations)
    if number < 2:
        raise ValueError(f"a mean and its error need two observations or more, got {number}: take more steps or seeds")
    mean, error = statistics.mean(observations), statistics.stdev(observations) / math.sqrt(number)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return MeanTest(number=number, mean=mean, standard_error=error, t=t, critical_t=critical_t(number - 1))


def critical_t(freedom: int) -> float:
    """What |t| passes by chance in 5 % of all cases, found by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return low


def _within(t: float, freedom: int) -> float:
    """The probability that Student's t lies within -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for power in range(1 + is_odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
