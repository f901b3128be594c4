"""The numbers of a run: a record a logging step, and a line of JSON for each."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Record:
    """The numbers of one logging step, or of one evaluation; what was not measured is None.

    Args:
        step: optimizer steps done.
        loss: mean since the last record, over supervised tokens, with the routers' balance loss if there is one.
        grad_norm: before it is scaled down.
        learning_rate: of the step.
        tokens_per_s: tokens trained on a second, evaluations and saves not counted.
        peak_gib: the most memory the run has held: of the GPU, or of the process where there is none.
        elapsed_s: since the training began.
        eval_loss: on the held-out rows.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_s: float | None = None
    peak_gib: float | None = None
    elapsed_s: float
    eval_loss: float | None = None


def append_json(path: Path, record: Record) -> None:
    """Add a record to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(record)) + "\n")


def peak_gib() -> float | None:
    """The most memory held so far in GiB: of the GPU, or of the process; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # macOS counts bytes, Linux KiB


def plot_losses(path: Path, records: Sequence[Record]) -> None:
    """Draw the losses over the steps into a PNG file."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(record.step, value) for record in records if (value := getattr(record, name)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, with the routers' balance loss if it is on")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
