"""Time the walk alone, from the sort of rows to their sum, forward and backward: what the GPU takes without the CPU.

    python benchmarks/walk_graph.py [--shape tiny|qwen3|gptoss|glm|moonlight] [--tokens 1024,4096] [--rank 64]
                                    [--packs before|once|twice]

Frozen experts in bfloat16 with LoRA in float32 on gate_up and down, even random routing, on the backend that `auto`
takes. A pass is recorded as one CUDA graph. "rested" are replays each after 30 ms of nothing; "sustained" are runs of
150 ms of replays, one run after another, in which a card reaches its power limit. Factors are packed before, as those
of recorded layers are, and not timed; or in forward, for both; or in forward and again in backward. Without a GPU the
pass is called instead, once a run.
Writes `runs/bench/walk_graph.json` with its provenance: medians and the best, in ms.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from expertune.experts import experts
from expertune.hosts.transformers import first_name, make_plan, named_experts
from expertune.memory.replay import RoutingReplay
from expertune.prepare import Preparation
from expertune.shapes import LoraFactors
from expertune.walk import Projection
from provenance import provenance
from shapes import frozen_model
from timing import arguments, time_ms

_REST_S = 0.03
_RUN_MS = 150
_AHEAD_CYCLES = 2_000_000  # in which a replay is submitted before it may begin
_STD = 0.02
PACKS = ("before", "once", "twice")


class Pass:
    """One forward and backward of the experts of a shape.

    Args:
        shape: of `shapes.py`, with experts.
        rank: of the adapters.
        device: where.
    """

    def __init__(self, shape: str, rank: int, device: torch.device) -> None:
        torch.manual_seed(0)
        model = frozen_model(shape, device)
        *_, (path, module) = named_experts(model)
        first, down = first_name(module), "down_proj"
        plan = make_plan(path, module, model.config.model_type, "auto", RoutingReplay())
        self.step, _ = plan.step(module.get_parameter(first), module.get_parameter(down))
        self._device, self._per_token = device, model.config.num_experts_per_tok
        layout = self.step.layout
        widths = {first: (layout.model_width, layout.first_width), down: (layout.expert_width, layout.model_width)}
        self._projections = tuple(
            Projection(
                weight=module.get_parameter(name),
                bias=module.get_parameter(f"{name}_bias") if layout.has_bias else None,
                adapters=(self._adapter(into, out, rank),),
            )
            for name, (into, out) in widths.items()
        )
        self.factors = [f for p in self._projections for adapter in p.adapters for f in (adapter.a, adapter.b)]

    def on(self, num_tokens: int, packs: str) -> Callable[[], list[Tensor]]:
        """A function that runs it on so many tokens, and gives the gradients of tokens, weights and factors.

        Args:
            num_tokens: of the batch.
            packs: of `PACKS`, when factors are packed.
        """
        random, layout = {"device": self._device}, self.step.layout
        x_TD, dout_TD = (self._normal(num_tokens, layout.model_width) for _ in range(2))
        expert_TK = torch.rand(num_tokens, layout.num_experts, **random).topk(self._per_token).indices
        weight_TK = torch.rand(num_tokens, self._per_token, **random).requires_grad_()
        wanted = [x_TD.requires_grad_(), weight_TK, *self.factors]
        first, second = self._projections
        preparation = Preparation(self.factors if packs == "before" else [])

        def run() -> list[Tensor]:
            rows = self.step.dispatch(expert_TK)
            with preparation.during():
                out_TD = experts(x_TD, rows, weight_TK, (first, second), self.step, keeps_packed=packs != "twice")
            return list(torch.autograd.grad(out_TD, wanted, dout_TD))

        if packs == "before":
            run()
            preparation.run()
        return run

    def _adapter(self, into: int, out: int, rank: int) -> LoraFactors:
        number = self.step.layout.num_experts
        sizes = (number * rank, into), (out, rank * number)
        a, b = (self._normal(*size, dtype=torch.float32).requires_grad_() for size in sizes)
        return LoraFactors(a=a, b=b, scale=1.0)

    def _normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*size, device=self._device) * _STD).to(dtype)


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one CUDA graph; the function itself without a GPU."""
    return Replayed(run) if torch.cuda.is_available() else run


class Replayed:
    """A function as one CUDA graph.

    Args:
        run: the function; it is kept, for the graph reads what it holds.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are built, and then launched as a program
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def __call__(self) -> None:
        self._graph.replay()


def measure(run: Callable[[], Any], num_rested: int, num_sustained: int) -> dict[str, list[float]]:
    """Median and best in ms, rested and sustained."""
    rested = []
    for _ in range(num_rested):
        time.sleep(_REST_S)
        rested.append(time_ms(run, ahead_cycles=_AHEAD_CYCLES))
    count = max(1, round(_RUN_MS / statistics.median(rested))) if torch.cuda.is_available() else 1
    sustained = [time_ms(run, count) for _ in range(num_sustained)]
    spans = {"rested": rested, "sustained": sustained}
    return {how: [round(statistics.median(each), 3), round(min(each), 3)] for how, each in spans.items()}


def main() -> None:
    """Measure, show, write."""
    parser = arguments(__doc__, tokens_on_gpu="1024,4096,16384,32768", tokens="64,256")
    parser.add_argument("--packs", choices=PACKS, default="once", help="factors")
    parser.add_argument("--rested", type=int, default=24, help="replays")
    parser.add_argument("--sustained", type=int, default=10, help="runs")
    args = parser.parse_args()
    console = Console()
    walk = Pass(args.shape, args.rank, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"shape": args.shape, "rank": args.rank, "backend": walk.step.backend.name}
    report = {"provenance": provenance("torch", "triton"), **settings, "packs": args.packs}
    rows: dict[int, dict[str, list[float]]] = {}
    for num_tokens in map(int, args.tokens.split(",")):
        run = replayed(walk.on(num_tokens, args.packs))
        rows[num_tokens] = measure(run, args.rested, args.sustained)
        console.print(f"{num_tokens:,} tokens, ms (best): {rows[num_tokens]}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "walk_graph.json"
    path.write_text(json.dumps(report | {"tokens": rows}, indent=1), encoding="utf-8")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
