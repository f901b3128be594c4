"""What benchmarks of one layer share: what they are asked, how a pass is timed, and what memory it takes."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shapes import SHAPES, expert_targets


def arguments(description: str | None, tokens_on_gpu: str, tokens: str) -> argparse.ArgumentParser:
    """A parser of shape, tokens, rank and output, whose defaults are small without a GPU.

    Args:
        description: of the benchmark.
        tokens_on_gpu, tokens: the lengths that are measured with a GPU and without.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    shapes = [shape for shape in SHAPES if expert_targets(shape)]
    parser.add_argument("--shape", choices=shapes, default="qwen3" if on_gpu else "tiny")
    parser.add_argument("--tokens", default=tokens_on_gpu if on_gpu else tokens)
    parser.add_argument("--rank", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    return parser


def time_ms(run: Callable[[], Any], count: int = 1, *, ahead_cycles: int = 0) -> float:
    """Milliseconds of a run, of so many one after another; at its end the device is done.

    Args:
        run: what is timed, on the GPU if there is one.
        count: of runs.
        ahead_cycles: of the GPU's clock, in which they are submitted before the first may begin.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(count):
            run()
        return 1000 * (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ahead_cycles:
        torch.cuda._sleep(ahead_cycles)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def taken_bytes(run: Callable[[], Any]) -> int | None:
    """Of the GPU's memory what a run takes at most beside what is there; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
