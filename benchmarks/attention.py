"""Time attention alone, forward and backward, by every kernel that can run, each as one CUDA graph.

    python benchmarks/attention.py [--heads 32/4] [--widths 128/128] [--tokens 4096,16384]
                                   [--rows whole window:1024 packed:64-511 packed:512-2999]

Heads of queries and of keys; widths of keys and of values; rows of one sample, of one in a sliding window, or of
several samples of so many tokens from and to, packed as in a step. In bfloat16 on random numbers. A kernel is timed
once its output and gradients are those of the first; kernels take turns. Without a GPU plain torch attends, in float32,
and is called instead. Writes `runs/bench/attention.json` with its provenance: medians in µs, TFLOP/s, counted by the
scores that attend (`2(D + V)` operations each forward, `2(3D + 2V)` backward), and MiB that backward takes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from expertune.attention.attend import PREFERRED
from expertune.attention.kernels import Attended, Kernel, Pattern
from expertune.attention.sequences import Sequences
from provenance import provenance
from sft_worker import sample_lengths
from timing import taken_bytes, time_ms
from walk_graph import replayed

_AHEAD_CYCLES = 200_000  # in which a replay is submitted before it may begin
_AGREES = 0.02  # of a tensor's norm: both kernels round to bfloat16 on their way


class Rows(NamedTuple):
    """How tokens lie: which keys each attends to, and how many in all."""

    sequences: Sequences | None
    window: int | None
    num_pairs: int

    @classmethod
    def of(cls, words: str, num_tokens: int, device: torch.device) -> "Rows":
        """`whole`, `window:1024` or `packed:512-2999`.

        Raises:
            ValueError: it is none of these.
        """
        kind, _, rest = words.partition(":")
        if kind == "whole" and not rest:
            return cls(None, None, _triangle(num_tokens))
        if kind == "window" and rest.isdigit():
            window = min(int(rest), num_tokens)
            return cls(None, window, _triangle(window) + (num_tokens - window) * window)
        shortest, _, longest = rest.partition("-")
        if kind != "packed" or not (shortest.isdigit() and longest.isdigit()):
            raise ValueError(f"expected whole, window:TOKENS or packed:FROM-TO, got {words!r}.")
        lengths = sample_lengths(num_tokens, (int(shortest), int(longest)), torch.Generator().manual_seed(0))
        position_BT = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        found = Sequences.of_positions(position_BT)  # None where one sample fills the row
        return cls(found and found.rounded(num_tokens), None, sum(map(_triangle, lengths)))


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


class Case:
    """One shape of attention, and its gradient.

    Args:
        heads: of queries, and of keys.
        widths: of keys, and of values.
        num_tokens: of one row of a batch.
        rows: how they lie.
        device: where.
    """

    def __init__(
        self, heads: tuple[int, int], widths: tuple[int, int], num_tokens: int, rows: Rows, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        sizes = ((heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]), (heads[0], widths[1]))
        drawn = [torch.randn(1, num_tokens, *size, device=device).to(dtype) for size in sizes]
        self.qkv = tuple(x.transpose(1, 2) for x in drawn[:3])
        self.dout_BTHV = drawn[3]
        self.pattern = Pattern(scale=widths[0] ** -0.5, window=rows.window, sequences=rows.sequences)
        D, V = widths
        pairs = rows.num_pairs * heads[0]
        self.num_operations = {"forward": 2 * (D + V) * pairs, "backward": 2 * (3 * D + 2 * V) * pairs}

    def kernels(self) -> list[Kernel]:
        """Those that can run; what runs anywhere only where nothing else does."""
        can = [k for k in PREFERRED if k.why_not(self.qkv[0], self.qkv[2], self.pattern) is None]
        return [kernel for kernel in can if kernel is not PREFERRED[-1]] or can

    def passes(self, kernel: Kernel) -> dict[str, Callable[[], Any]]:
        """Forward and backward by a kernel, each as what is timed."""
        attended = kernel.forward(*self.qkv, self.pattern)
        return {
            "forward": lambda: kernel.forward(*self.qkv, self.pattern),
            "backward": lambda: self.gradients(kernel, attended),
        }

    def gradients(self, kernel: Kernel, attended: Attended) -> tuple[Tensor, ...]:
        """Of queries, keys and values."""
        return kernel.backward(self.dout_BTHV, *self.qkv, attended, self.pattern)

    def results(self, kernel: Kernel) -> list[Tensor]:
        """The output and the gradients."""
        attended = kernel.forward(*self.qkv, self.pattern)
        return [attended.out_BTHV, *self.gradients(kernel, attended)]


def measure(case: Case, num_times: int) -> dict[str, dict[str, Any]]:
    """Of each kernel its times, its speeds and what its backward takes.

    Raises:
        RuntimeError: one computes something else than the first.
    """
    kernels = case.kernels()
    expected = case.results(kernels[0])
    for kernel in kernels[1:]:
        for name, x, y in zip(("out", "dq", "dk", "dv"), case.results(kernel), expected, strict=True):
            if not (difference := float((x.float() - y.float()).norm() / y.float().norm())) <= _AGREES:
                raise RuntimeError(
                    f"{name} of {kernel.name} differs from that of {kernels[0].name} by {difference:.3f}."
                )
    runs = {(k.name, name): replayed(run) for k in kernels for name, run in case.passes(k).items()}
    times: dict[tuple[str, str], list[float]] = {which: [] for which in runs}
    for _ in range(num_times):
        for which, run in runs.items():
            times[which].append(1000 * time_ms(run, ahead_cycles=_AHEAD_CYCLES))
    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        row = rows[kernel.name] = {}
        for name, count in case.num_operations.items():
            us = statistics.median(times[kernel.name, name])
            row[f"{name}_us"], row[f"{name}_tflops"] = round(us, 1), round(count / us / 1e6, 1)
        taken = taken_bytes(case.passes(kernel)["backward"])
        row["backward_mib"] = None if taken is None else taken >> 20
    return rows


def _pair(words: str) -> tuple[int, int]:
    first, _, second = words.partition("/")
    return int(first), int(second or first)


def main() -> None:
    """Measure, show, write."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=_pair, default=(32, 4) if on_gpu else (4, 2), help="of queries / of keys")
    parser.add_argument("--widths", type=_pair, default=(128, 128) if on_gpu else (16, 16), help="of keys / of values")
    parser.add_argument("--tokens", default="4096,16384" if on_gpu else "64")
    parser.add_argument("--rows", nargs="+", default=["whole", "window:1024", "packed:64-511", "packed:512-2999"])
    parser.add_argument("--times", type=int, default=15, help="of each pass")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    console, device = Console(), torch.device("cuda" if on_gpu else "cpu")
    report: dict[str, Any] = {"provenance": provenance("torch", "triton"), "heads": args.heads, "widths": args.widths}
    report["cases"] = []
    for num_tokens in map(int, args.tokens.split(",")):
        for words in args.rows:
            case = Case(args.heads, args.widths, num_tokens, Rows.of(words, num_tokens, device), device)
            found = measure(case, args.times)
            report["cases"].append({"tokens": num_tokens, "rows": words, "kernels": found})
            for name, row in found.items():
                console.print(f"{num_tokens:,} tokens, {words}, {name}: {row}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "attention.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
