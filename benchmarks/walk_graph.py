"""Time the walk alone, from the sort of rows to their sum, forward and backward: what the GPU takes without the CPU.

    python benchmarks/walk_graph.py [--shape tiny|qwen3|gptoss|glm] [--tokens 1024,4096] [--rank 64] [--packs-twice]

Frozen experts in bfloat16 with LoRA in float32 on gate_up and down, even random routing, on the backend that `auto`
takes. A pass is recorded as one CUDA graph. "rested" are replays each after 30 ms of nothing; "sustained" are runs of
150 ms of replays, one run after another, in which a card reaches its power limit. Factors are packed once, as in the
recorded layers of a model, or in forward and again in backward. Without a GPU the pass is called instead, once a run.
Writes `runs/bench/walk_graph.json` with its provenance: medians and the best, in ms.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dimensions import dimensions
from expertune.activations import ClampedSwiGlu, SwiGlu
from expertune.backends import choose
from expertune.experts import experts
from expertune.shapes import ExpertsLayout, LoraFactors, Problem
from expertune.walk import ExpertsStep, Projection
from provenance import provenance
from shapes import SHAPES, expert_targets

_REST_S = 0.03
_RUN_MS = 150
_AHEAD_CYCLES = 2_000_000  # in which a replay is submitted before it may begin
_STD = 0.02


class Pass:
    """One forward and backward of the experts of a shape.

    Args:
        shape: of `shapes.py`, with experts.
        rank: of the adapters.
        device: where.
    """

    def __init__(self, shape: str, rank: int, device: torch.device) -> None:
        torch.manual_seed(0)
        found = dimensions(shape, layers=2)
        routed = found.layers[-1].experts
        assert routed is not None
        self._num_experts, self._per_token = routed.number, routed.per_token
        self._width, self._device = found.width, device
        is_gpt_oss = shape == "gptoss"
        layout = ExpertsLayout(
            num_experts=routed.number,
            model_width=found.width,
            expert_width=routed.width,
            has_gate=True,
            is_transposed=is_gpt_oss,
            has_bias=is_gpt_oss,
        )
        self._projections = tuple(
            self._projection(layout, widths, rank)
            for widths in ((found.width, 2 * routed.width), (routed.width, found.width))
        )
        widths = (found.width, 2 * routed.width, routed.width)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        problem = Problem(device=device.type, capability=capability, dtype=torch.bfloat16, widths=widths, is_dense=True)
        backend, _ = choose(problem, "auto")
        gate = ClampedSwiGlu(1.702, 7.0) if is_gpt_oss else SwiGlu()
        self.step = ExpertsStep(layout=layout, gate=gate, backend=backend)
        self.factors = [f for p in self._projections for adapter in p.adapters for f in (adapter.a, adapter.b)]

    def on(self, num_tokens: int, *, keeps_packed: bool) -> Callable[[], list[Tensor]]:
        """A function that runs it on so many tokens, and gives the gradients of tokens, weights and factors."""
        random = {"device": self._device}
        x_TD, dout_TD = (self._normal(num_tokens, self._width) for _ in range(2))
        expert_TK = torch.rand(num_tokens, self._num_experts, **random).topk(self._per_token).indices
        weight_TK = torch.rand(num_tokens, self._per_token, **random).requires_grad_()
        wanted = [x_TD.requires_grad_(), weight_TK, *self.factors]
        first, second = self._projections

        def run() -> list[Tensor]:
            rows = self.step.dispatch(expert_TK)
            out_TD = experts(x_TD, rows, weight_TK, (first, second), self.step, keeps_packed=keeps_packed)
            return list(torch.autograd.grad(out_TD, wanted, dout_TD))

        return run

    def _projection(self, layout: ExpertsLayout, widths: tuple[int, int], rank: int) -> Projection:
        into, out = widths
        number = layout.num_experts
        a, b = (
            self._normal(*size, dtype=torch.float32).requires_grad_()
            for size in ((number * rank, into), (out, rank * number))
        )
        return Projection(
            weight=self._normal(number, *(widths if layout.is_transposed else (out, into))),
            bias=self._normal(number, out) if layout.has_bias else None,
            adapters=(LoraFactors(a=a, b=b, scale=1.0),),
        )

    def _normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*size, device=self._device) * _STD).to(dtype)


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one CUDA graph; the function itself without a GPU."""
    if not torch.cuda.is_available():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are built, and then launched as a program
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(run: Callable[[], Any], num_rested: int, num_sustained: int) -> dict[str, list[float]]:
    """Median and best in ms, rested and sustained."""
    rested = []
    for _ in range(num_rested):
        _synchronize()
        time.sleep(_REST_S)
        rested.append(_time_ms(run, 1, is_ahead=True))
    count = max(1, round(_RUN_MS / statistics.median(rested))) if torch.cuda.is_available() else 1
    sustained = [_time_ms(run, count) for _ in range(num_sustained)]
    spans = {"rested": rested, "sustained": sustained}
    return {how: [round(statistics.median(each), 3), round(min(each), 3)] for how, each in spans.items()}


def _time_ms(run: Callable[[], Any], count: int, *, is_ahead: bool = False) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(count):
            run()
        return 1000 * (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if is_ahead:
        torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    shapes = [shape for shape in SHAPES if expert_targets(shape)]
    parser.add_argument("--shape", choices=shapes, default="qwen3" if on_gpu else "tiny")
    parser.add_argument("--tokens", default="1024,4096,16384,32768" if on_gpu else "64,256")
    parser.add_argument("--rank", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--packs-twice", action="store_true", help="factors, as in layers that are not recorded")
    parser.add_argument("--rested", type=int, default=24, help="replays")
    parser.add_argument("--sustained", type=int, default=10, help="runs")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    console = Console()
    walk = Pass(args.shape, args.rank, torch.device("cuda" if on_gpu else "cpu"))
    settings = {"shape": args.shape, "rank": args.rank, "backend": walk.step.backend.name}
    report = {"provenance": provenance("torch", "triton"), **settings, "keeps_packed": not args.packs_twice}
    rows: dict[int, dict[str, list[float]]] = {}
    for num_tokens in map(int, args.tokens.split(",")):
        run = replayed(walk.on(num_tokens, keeps_packed=not args.packs_twice))
        rows[num_tokens] = measure(run, args.rested, args.sustained)
        console.print(f"{num_tokens:,} tokens, ms (best): {rows[num_tokens]}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "walk_graph.json"
    path.write_text(json.dumps(report | {"tokens": rows}, indent=1), encoding="utf-8")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
