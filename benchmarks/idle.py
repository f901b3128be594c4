"""Where a GPU waits in a step: the gaps between what it runs, and the time around all of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

_SHORT_US = 10  # a gap between two kernels that were there to run
_LONGEST = 6


class Run(NamedTuple):
    """A kernel or a copy, with its start and end in microseconds."""

    start: float
    end: float
    name: str


def idle(runs: Sequence[Run], step_ms: float) -> dict[str, Any]:
    """Milliseconds in which nothing ran, of a step that took `step_ms` from one synchronisation to the next.

    Returns:
        `around`: before the first run and after the last; `short`: gaps of at most 10 µs; `long`: the others;
        `longest`: of these the longest, each with the names of what ended and what began.
    """
    gaps: list[tuple[float, str, str]] = []
    ordered = sorted(runs)
    last = ordered[0]
    for run in ordered[1:]:
        if run.start > last.end:
            gaps.append((run.start - last.end, last.name, run.name))
        if run.end > last.end:
            last = run
    short = sum(gap for gap, *_ in gaps if gap <= _SHORT_US)
    longest = [(_ms(gap), after[:60], before[:60]) for gap, after, before in sorted(gaps, reverse=True)[:_LONGEST]]
    return {
        "around": round(step_ms - _ms(last.end - ordered[0].start), 2),
        "short": _ms(short),
        "long": _ms(sum(gap for gap, *_ in gaps) - short),
        "longest": [each for each in longest if each[0] > _ms(_SHORT_US)],
    }


def _ms(us: float) -> float:
    return round(us / 1000, 2)
