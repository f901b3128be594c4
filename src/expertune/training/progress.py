"""What a run shows: stages by name before the first step, then a bar; plain lines where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status

from expertune.training.metrics import Record


class Display:
    """The one place that prints during a run. A context manager, so that a bar never outlives an error.

    Args:
        console: to print on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status: Status | None = None
        self._stage = ""
        self._stage_start_s = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        self.stop_bar()

    @contextmanager
    def stage(self, name: str, *, spins: bool = True) -> Iterator[None]:
        """Say what is going on, and at its end how long it took."""
        self.begin_stage(name, spins=spins)
        yield
        self.end_stage()

    def begin_stage(self, name: str, *, spins: bool = True) -> None:
        """Begin a stage that `end_stage` ends; `spins` is false where a host shows a bar of its own."""
        self._stage, self._stage_start_s = name, time.perf_counter()
        if self.console.is_terminal and spins:
            self._status = self.console.status(name)
            self._status.start()
        else:
            self.say(f"{name} ...")

    def end_stage(self) -> None:
        """End the stage; on a terminal its line stays, with the time that it took."""
        if self._status is not None:
            self._status.stop()
            self._status = None
            self.say(f"{self._stage} [dim]{time.perf_counter() - self._stage_start_s:.1f} s[/dim]", markup=True)

    def say(self, text: str, *, style: str | None = None, markup: bool = False) -> None:
        """Print a line."""
        self.console.print(text, style=style, markup=markup, highlight=False, soft_wrap=True)

    def start_bar(self, num_steps: int) -> None:
        """Begin to show steps."""
        if not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=8),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=num_steps)
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, record: Record, num_steps: int, eta_s: float) -> None:
        """Show the numbers of a step, or of an evaluation after it; `eta_s` is 0 where it is not known."""
        if self._bar is not None and record.loss is not None:
            self._bar.update(self._task, description=_numbers(record))
            return
        step = f"step {record.step}/{num_steps}" if num_steps else f"step {record.step}"
        eta = f"  ETA {timedelta(seconds=round(eta_s))}" if eta_s and record.loss is not None else ""
        self.say(f"{step}  {_numbers(record)}{eta}")

    def stop_bar(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _numbers(record: Record) -> str:
    if record.eval_loss is not None:
        return f"held-out loss {record.eval_loss:.4f}"
    parts = {
        "loss {:.4f}": record.loss,
        "grad norm {:.2g}": record.grad_norm,
        "{:,.0f} tok/s": record.tokens_per_s,
        "{:.2f} GiB": record.peak_gib,
    }
    return "  ".join(text.format(value) for text, value in parts.items() if value is not None)
