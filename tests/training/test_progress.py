import io

import pytest
from rich.console import Console

from expertune.training.metrics import Record
from expertune.training.progress import Display

TRAINING = Record(
    step=2, loss=1.25, grad_norm=0.5, learning_rate=1e-4, tokens_per_s=1234.5, peak_gib=1.5, elapsed_s=3.0
)
HELD_OUT = Record(step=2, eval_loss=1.5, elapsed_s=4)


def shown(*, terminal: bool, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    with Display(console) as display:
        with display.stage("reading the data"):
            pass
        display.start_bar(10)
        display.advance(2)
        display.show(TRAINING, 10, eta_s=75)
        display.show(HELD_OUT, 10, eta_s=75)
        display.stop_bar()
    return file.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    text = shown(terminal=False)
    assert text.splitlines() == [
        "reading the data ...",
        "step 2/10  loss 1.2500  grad norm 0.5  1,234 tok/s  1.50 GiB  ETA 0:01:15",
        "step 2/10  held-out loss 1.5000",
    ]
    assert text.replace("\n", "").isprintable()


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    for part in ("reading the data", "step 2/10", "loss 1.2500", "1,234 tok/s", "1.50 GiB", "ETA", "held-out loss 1.5"):
        assert part in text


def test_the_bar_does_not_outlive_an_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), Display(console) as display:
        display.begin_stage("first step")
        raise RuntimeError
    console.file = file = io.StringIO()
    with Display(console) as display:  # a live display still there would make rich refuse a second
        display.start_bar(3)
    assert "0/3" in file.getvalue()
