"""What `expertune tune` shows while it searches: a bar with rate and ETA; plain lines where there is no terminal."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TuneProgress:
    """A context manager, so that a bar never outlives an error.

    Args:
        console: to print on.
        num_trials: configurations to try in all.
    """

    def __init__(self, console: Console, num_trials: int) -> None:
        self._console = console
        self._num_trials, self._num_done = num_trials, 0
        self._name, self._start_s = "", time.perf_counter()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[rate]}/min"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_trials, rate="-")

    def __enter__(self) -> "TuneProgress":
        self._bar.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """Say what is searched now."""
        self._name = name
        self._bar.update(self._task, description=name)

    def advance(self) -> None:
        """Count a trial."""
        self._num_done += 1
        rate = 60 * self._num_done / (time.perf_counter() - self._start_s)
        self._bar.update(self._task, completed=self._num_done, rate=f"{rate:.0f}")

    def end(self, outcome: str) -> None:
        """Say what came of it, where no bar does."""
        if not self._console.is_terminal:
            left = (time.perf_counter() - self._start_s) * (self._num_trials / self._num_done - 1)
            eta = timedelta(seconds=round(left))
            self.say(f"{self._num_done}/{self._num_trials}  {self._name}: {outcome}  ETA {eta}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
