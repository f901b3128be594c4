"""Compare loss curves: expertune under each memory policy against stock Transformers + PEFT, through TRL's SFTTrainer.

    python benchmarks/loss_curves.py [--shape tiny|qwen3|gptoss|glm|moonlight] [--layers 2] [--steps 30]
                                     [--seeds 0,1,2,…] [--data rows.jsonl] [--rank 8] [--context 256] [--batch 8]

A random-weight model in bfloat16 and, for each seed, an adapter of stock PEFT are written once and loaded by all; no
factor is zero, so that the experts' adapters matter from the first step. Same rows in the same order, torch's AdamW,
unpacked and packed. The residual of each curve is taken against stock's of the same seed and packing, and its mean
counts as different from zero where a t test says so, two-sided at 95 %: once over all steps of all seeds, and once over
the means of the seeds, because residuals of one run hang together. Of twenty means that are zero, a right test finds
one different. Two controls show what rounding in bfloat16 alone does: stock with its eager attention and experts, which
rounds in other places, and stock in float32, which does not round. Stock gpt-oss, whose packed samples would see each
other, gets masks that keep them apart. Writes `runs/bench/loss_curves.json` with its
provenance and `loss_curves.png`.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import expertune
from apart import keep_samples_apart
from curve_data import read_rows, train_tokenizer
from provenance import provenance
from residuals import MeanTest, Residuals, residuals
from shapes import SHAPES, attention_targets, expert_targets, write_model

REFERENCE, FLOAT32 = "transformers", "transformers:float32"
VARIANTS = (REFERENCE, "transformers:eager", FLOAT32, "expertune:auto", "expertune:fast", "expertune:lean")
PACKINGS = ("unpacked", "packed")


@dataclass(frozen=True)
class Run:
    """One training: who trains, on what, with the adapter and in the order of which seed."""

    variant: str
    packing: str
    seed: int


Curves = dict[str, dict[str, list[list[float]]]]  # packing, variant, seed, step


def write_adapter(shape: str, base: Path, folder: Path, rank: int, seed: int) -> None:
    """A stock PEFT adapter on the attention and on all experts, without a zero."""
    torch.manual_seed(seed)
    parameters = [f"mlp.experts.{name}" for name in expert_targets(shape)]
    lora = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
    config = LoraConfig(**lora, target_modules=attention_targets(shape), target_parameters=parameters)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                factor.normal_(std=0.02)
    model.save_pretrained(folder)


def load(variant: str, base: Path, adapter: Path) -> Any:
    """The model with the adapter, as this variant runs it."""
    name, _, choice = variant.partition(":")
    if name == "expertune":
        return expertune.load(str(adapter), memory=choice)[0]
    eager = {"experts_implementation": "eager", "attn_implementation": "eager"}
    how = eager if choice == "eager" else {"experts_implementation": "grouped_mm"}
    device = {"": 0} if torch.cuda.is_available() else None
    dtype = torch.float32 if variant == FLOAT32 else "auto"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=device, **how)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def train(run: Run, rows: list[dict[str, Any]], base: Path, adapter: Path, args: argparse.Namespace) -> list[float]:
    """Take some steps; the loss of each."""
    model, is_packed = load(run.variant, base, adapter), run.packing == "packed"
    is_stock = run.variant.startswith(REFERENCE)
    if is_packed and is_stock:
        keep_samples_apart(model.get_base_model().get_decoder())
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_length=args.context,
            packing=is_packed,
            per_device_train_batch_size=1 if is_packed else args.batch,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            bf16=run.variant != FLOAT32,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=is_stock,  # ours recomputes by its own policy
            seed=run.seed,
            data_seed=run.seed,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def measure(
    args: argparse.Namespace, rows: list[dict[str, Any]], folder: Path, console: Console
) -> Iterator[tuple[list[int], Curves]]:
    """After each seed those so far, and their curves. All train one after another; each run loads the model anew."""
    base = folder / "base"
    write_model(args.shape, args.layers, base)
    train_tokenizer(rows, SHAPES[args.shape][1]["vocab_size"]).save_pretrained(base)
    curves: Curves = {packing: {variant: [] for variant in args.variants} for packing in PACKINGS}
    runs = [Run(variant, packing, seed) for seed in args.seeds for packing in PACKINGS for variant in args.variants]
    tracked = track(runs, description="training", console=console)
    for number, (seed, of_seed) in enumerate(groupby(tracked, attrgetter("seed")), 1):
        adapter = folder / f"adapter-{seed}"
        write_adapter(args.shape, base, adapter, args.rank, seed)
        for run in of_seed:
            curves[run.packing][run.variant].append(train(run, rows, base, adapter, args))
            gc.collect()
            torch.cuda.empty_cache()
        yield args.seeds[:number], curves


def compare(curves: Curves) -> dict[str, dict[str, Residuals]]:
    """The residuals of each variant but the reference, by packing."""
    return {
        packing: {
            name: residuals(each, by_variant[REFERENCE]) for name, each in by_variant.items() if name != REFERENCE
        }
        for packing, by_variant in curves.items()
    }


def plot(curves: Curves, path: Path, title: str) -> None:
    """Above the curves of the first seed, below the residuals of all seeds; unpacked left, packed right."""
    figure = Figure(figsize=(11, 7))
    for column, (packing, by_variant) in zip(figure.subplots(2, 2).T, curves.items(), strict=True):
        for index, (variant, seeds) in enumerate(by_variant.items()):
            column[0].plot(range(1, 1 + len(seeds[0])), seeds[0], label=variant, color=f"C{index}")
            for curve, reference in zip(seeds, by_variant[REFERENCE], strict=True) if variant != REFERENCE else ():
                apart = [a - b for a, b in zip(curve, reference, strict=True)]
                column[1].plot(range(1, 1 + len(apart)), apart, color=f"C{index}", alpha=0.6)
        column[0].set(title=packing, ylabel="loss")
        column[1].set(xlabel="step", ylabel=f"loss - that of {REFERENCE}")
        column[1].axhline(0, color="black", linewidth=0.8)
        column[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def show(compared: dict[str, dict[str, Residuals]], console: Console) -> None:
    """A table of the residuals."""
    for packing, by_variant in compared.items():
        table = Table("", "mean", "t over steps", "t over seeds", "largest", title=f"{packing}: 1,000 x residuals")
        for variant, found in by_variant.items():
            tests = (_verdict(test) for test in (found.steps, found.seeds))
            table.add_row(variant, f"{1000 * found.steps.mean:+.3f}", *tests, f"{1000 * found.largest:.2f}")
        console.print(table)


def _verdict(test: MeanTest | None) -> str:
    if test is None:
        return "one seed"
    return f"{test.t:+.2f} {'>' if test.is_different else '<'} {test.critical_t:.2f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [shape for shape in SHAPES if expert_targets(shape)]
    parser.add_argument("--shape", choices=shapes, default="tiny")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"the first must be {REFERENCE}")
    parser.add_argument(
        "--data", type=Path, help="JSON lines with prompt and completion, question and answer, or messages"
    )
    parser.add_argument("--rows", type=int, default=1024, help="of the data, at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens of a packed row, and at most of a row")
    parser.add_argument("--batch", type=int, default=8, help="unpacked rows a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.variants = args.variants.split(",")
    if args.variants[0] != REFERENCE or not set(args.variants) <= set(VARIANTS):
        parser.error(f"variants are {REFERENCE}, then some of {list(VARIANTS[1:])}; got {args.variants}")
    return args


def write(
    args: argparse.Namespace, seeds: list[int], curves: Curves, compared: dict[str, dict[str, Residuals]]
) -> None:
    """The report and its plot."""
    args.output.mkdir(parents=True, exist_ok=True)
    names = ("shape", "layers", "steps", "rank", "context", "batch", "learning_rate")
    report = {
        "provenance": provenance("torch", "triton", "transformers", "peft", "trl"),
        "command": " ".join(sys.argv),
        **{name: getattr(args, name) for name in names},
        "seeds": seeds,
        "data": args.data.name if args.data else "the demo's sentences",
        "residuals": {
            packing: {name: asdict(found) for name, found in by_variant.items()}
            for packing, by_variant in compared.items()
        },
        "losses": curves,
    }
    (args.output / "loss_curves.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(curves, args.output / "loss_curves.png", f"{args.shape} shape, {args.layers} layers, r={args.rank}, bf16")


def main() -> None:
    """Train, compare, show, write: after every seed what there is by then."""
    args, console = arguments(), Console()
    rows = read_rows(args.data, args.rows)
    compared: dict[str, dict[str, Residuals]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seeds, curves in measure(args, rows, Path(folder), console):
            compared = compare(curves)
            write(args, seeds, curves, compared)
    show(compared, console)
    console.print(f"wrote {args.output}/loss_curves.json and loss_curves.png")


if __name__ == "__main__":
    main()
