"""Gaps of a GPU's work are added up by their length."""

from idle import Run, idle


def test_gaps_are_added_up() -> None:
    runs = [
        Run(1000, 2000, "a"),
        Run(2004, 3000, "b"),
        Run(2500, 2600, "a copy beside it"),
        Run(5000, 5500, "c"),
        Run(5508, 6000, "d"),
    ]
    found = idle(runs[::-1], step_ms=7.5)
    assert found == {"around": 2.5, "short": 0.01, "long": 2.0, "longest": [(2.0, "b", "c")]}


def test_a_step_of_one_run() -> None:
    assert idle([Run(0, 400, "a")], step_ms=1.0) == {"around": 0.6, "short": 0.0, "long": 0.0, "longest": []}
