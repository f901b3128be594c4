"""Time the MoE block of one layer, forward and backward: stock Transformers + PEFT and each of our backends.

    python benchmarks/moe_block.py [--shape tiny|qwen3|gptoss|glm|moonlight] [--tokens 1024,4096] [--rank 64] [--skew 0]

LoRA on gate_up and down of all experts, frozen base, no checkpointing. All variants run on the same weights and inputs;
a variant is timed only after its output and gradients agreed with stock. Variants alternate, the L2 cache is flushed
between runs, medians count. Writes `runs/bench/moe_block.json` with its provenance and `moe_block.png`.
"""

import json
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import expertune
from expertune.backends import PREFERRED
from provenance import provenance
from shapes import expert_targets, frozen_model
from timing import arguments, taken_bytes, time_ms

STOCK = "transformers + peft"
_AGREES = 0.03  # bf16 rounding of a block, relative to the norm; a wrong expert or scale is off by more than a third


class Block:
    """The MoE block of a model's last layer, with LoRA, as one variant after another runs it."""

    def __init__(self, shape: str, rank: int, skew: float, device: torch.device) -> None:
        torch.manual_seed(0)
        model = frozen_model(shape, device)
        self.width = model.config.hidden_size
        targets = [f"mlp.experts.{name}" for name in expert_targets(shape)]
        self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=targets))
        self.block = next(m for name, m in self.model.named_modules() if name.endswith("layers.1.mlp"))
        self.factors = [p for p in self.block.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, parameter in self.block.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
                if name.endswith(("gate.weight", "router.weight")):
                    # rows of unequal norm win the top-k unequally often
                    parameter.mul_(torch.exp(skew * torch.randn(len(parameter), 1, device=device)).to(parameter))

    def use(self, variant: str) -> None:
        """Run as this variant from now on."""
        expertune.restore(self.model)
        if variant != STOCK:
            expertune.optimize(self.model, backend=variant)

    def run(self, x: Tensor, dout: Tensor) -> list[Tensor]:
        """Output and gradients of one pass."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.block(x)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, [x, *self.factors], dout)]


def variants(block: Block, inputs: tuple[Tensor, Tensor], console: Console) -> list[str]:
    """Those that run here and agree with stock."""
    block.use(STOCK)
    expected = block.run(*inputs)
    usable = [STOCK]
    for backend in PREFERRED:
        try:
            block.use(backend.name)
        except ValueError as error:
            console.print(f"{backend.name}: {error}", style="dim")
            continue
        pairs = zip(block.run(*inputs), expected, strict=True)
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
        if error > _AGREES:
            raise RuntimeError(f"{backend.name} disagrees with stock by {error:.3f}; nothing was timed.")
        usable.append(backend.name)
    return usable


def measure(block: Block, names: list[str], inputs: tuple[Tensor, Tensor], repeats: int) -> dict[str, dict[str, float]]:
    """Median and spread in ms, and peak GiB over what was resident, of each variant; they alternate."""
    device = inputs[0].device
    flush = torch.empty(2**28 if device.type == "cuda" else 2**20, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in names}
    peak: dict[str, float] = {}
    for round_number in range(3):
        for name in names:
            block.use(name)
            for _ in range(2):
                block.run(*inputs)
            peak[name] = round((taken_bytes(lambda: block.run(*inputs)) or 0) / 2**30, 3)
            for _ in range(repeats if round_number else 0):
                flush.zero_()
                times[name].append(time_ms(lambda: block.run(*inputs)))
    return {
        name: {
            "ms": round(statistics.median(times[name]), 3),
            "ms_min": round(min(times[name]), 3),
            "peak_gib": peak[name],
        }
        for name in names
    }


def plot(results: dict[int, dict[str, dict[str, float]]], path: Path, title: str) -> None:
    """Milliseconds over tokens, a line a variant."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name in next(iter(results.values())):
        axes.plot(list(results), [row[name]["ms"] for row in results.values()], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward + backward", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Measure, show, write."""
    parser = arguments(__doc__, tokens_on_gpu="1024,4096,16384", tokens="64,256,1024")
    parser.add_argument("--skew", type=float, default=0.0, help="0 is uniform routing")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = Block(args.shape, args.rank, args.skew, device)
    results: dict[int, dict[str, dict[str, float]]] = {}
    for num_tokens in track([int(n) for n in args.tokens.split(",")], description="measuring", console=console):
        x = torch.randn(1, num_tokens, block.width, device=device, dtype=torch.bfloat16).requires_grad_()
        inputs = x, torch.randn_like(x)
        results[num_tokens] = measure(block, variants(block, inputs, console), inputs, args.repeats)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"shape": args.shape, "rank": args.rank, "skew": args.skew}
    report = {"provenance": provenance("torch", "transformers", "peft"), **settings, "tokens": results}
    (args.output / "moe_block.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(results, args.output / "moe_block.png", f"MoE block, {args.shape} shape, r={args.rank}")
    table = Table("tokens", *next(iter(results.values())), title="ms (ratio to stock)")
    for num_tokens, row in results.items():
        cells = [f"{cell['ms']:.2f} ({row[STOCK]['ms'] / cell['ms']:.2f}x)" for cell in row.values()]
        table.add_row(f"{num_tokens:,}", *cells)
    console.print(table)
    console.print(f"wrote {args.output}/moe_block.json and moe_block.png")


if __name__ == "__main__":
    main()
