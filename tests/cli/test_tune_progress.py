import io

import pytest
from rich.console import Console

from expertune.cli.tune_progress import TuneProgress


def shown(*, terminal: bool) -> str:
    file = io.StringIO()
    with TuneProgress(Console(file=file, force_terminal=terminal, width=100), num_trials=4) as progress:
        for name in ("linear", "shrink"):
            progress.begin(name)
            progress.advance()
            progress.advance()
            progress.end("128x64 [4 warps]")
    return file.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split("  ETA ")[0] for line in lines if line] == [
        "2/4  linear: 128x64 [4 warps]",
        "4/4  shrink: 128x64 [4 warps]",
    ]
    assert "ETA 0:00:00" in lines[1]


def test_a_bar_with_rate_and_eta_on_a_terminal() -> None:
    text = shown(terminal=True)
    for part in ("4/4", "shrink", "/min", "ETA"):
        assert part in text
    assert "128x64" not in text


def test_the_bar_does_not_outlive_an_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), TuneProgress(console, num_trials=4):
        raise RuntimeError
    with TuneProgress(console, num_trials=1):  # a live display still there would make rich refuse a second
        pass
