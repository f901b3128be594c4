"""Time a step of supervised fine-tuning through TRL's SFTTrainer: expertune and its peers, each in its own process.

    python benchmarks/sft_step.py [--shape tiny|qwen3|gptoss|glm|moonlight] [--layers 12] [--contexts 1024,4096]
                                  [--peers transformers,expertune,unsloth] [--rank 64] [--memory auto] [--longest]
                                  [--adapter-dtype float32|bfloat16] [--rows whole|packed|padded] [--sample 64,511]
                                  [--processes 1]

A random-weight model of the real shape is written once and read by every peer as its own documentation says. LoRA on
the attention and on all experts, batch 1, bf16, the router frozen, checkpointing as a peer does it. 8-bit AdamW:
bitsandbytes', and for expertune its own, without the trainer's check for infinite losses; with `--adam bitsandbytes`
all have theirs, and the trainer is as it is. A peer may name how it runs: `expertune:lean` its memory,
`transformers:eager` its experts (Transformers' loop over them). On a GPU a context takes `--steps` and one more for
each time that it goes into 32,768, at most 32, for short steps vary most. The median of the steps after the fourth
counts; the last is profiled, and its GPU time split by part. With `--longest` the longest that trains is found by
bisection. With `--rows packed` a context is samples of 64 to 511 tokens or as `--sample` says, as TRL packs them; with
`--rows padded` it is a batch of such samples, one for each 512 of its tokens, as TRL pads them: for ours to a multiple
of 128. With `--processes` each peer runs under DDP, a GPU and a batch a process; the figures are of the first, tokens
of all. Writes `runs/bench/sft_step.json` with its provenance and `sft_step.png`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import step_report
from provenance import provenance
from sft_worker import PEERS, ROWS, work
from shapes import SHAPES, write_model

_CHOICES = "expertune:MEMORY, transformers:EXPERTS"
_SETTINGS = ("shape", "layers", "rank", "memory", "adapter_dtype", "adam", "steps", "rows", "sample", "processes")
_PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth")


def write(shape: str, layers: int, folder: Path) -> None:
    """A checkpoint and its tokenizer."""
    write_model(shape, layers, folder)
    write_tokenizer(folder)


def _in_a_process_of_its_own(function: Callable[..., None], *args: Any) -> None:
    """Call a function so that none of the memory it took on the card is missing there afterwards."""
    process = get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} ended with status {process.exitcode}")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of words, because a trainer wants one; the data are random ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def _from_and_to(words: str) -> tuple[int, int]:
    shortest, longest = map(int, words.split(","))
    return shortest, longest


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for table in step_report.tables(report):
        shown = Table(*table.header)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def main() -> None:
    """Run each peer, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--peers", default="transformers,expertune", help=f"of {', '.join(PEERS)}, {_CHOICES}")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--memory", default="auto", help="of expertune, where its name does not say")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32", help="of expertune's")
    parser.add_argument(
        "--adam", choices=("expertune", "bitsandbytes"), default="expertune", help="of expertune; see above"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", choices=ROWS, default="whole", help="what a batch is made of")
    parser.add_argument("--sample", type=_from_and_to, default=(64, 511), help="tokens of packed and padded ones")
    parser.add_argument("--processes", type=int, default=1, help="a peer, under DDP")
    parser.add_argument("--longest", action="store_true", help="find the longest context, too")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a peer has")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--folder", help="of the model, to keep it for the next time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 6 and torch.cuda.is_available():
        parser.error("--steps must be at least 6 on a GPU: four warm up, and the last one is profiled")
    if args.longest and args.processes > 1:
        parser.error("--longest runs out of memory on purpose, which one of several --processes cannot alone")
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if args.worker:
        peer, _, choice = args.worker.partition(":")
        args.memory = choice if peer == "expertune" and choice else args.memory
        args.experts = choice or "grouped_mm"
        work(peer, args)
        return
    if unknown := [peer for peer in args.peers.split(",") if peer.partition(":")[0] not in PEERS]:
        parser.error(f"unknown peers {unknown}; choose among {list(PEERS)}, {_CHOICES}")
    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder or made)
        if not (folder / "config.json").is_file():
            with console.status(f"writing a model of {args.layers} layers"):
                _in_a_process_of_its_own(write, args.shape, args.layers, folder)
        settings = {key: getattr(args, key) for key in _SETTINGS}
        report = {"provenance": provenance(*_PACKAGES), "command": " ".join(sys.argv), **settings, "peers": results}
        args.output.mkdir(parents=True, exist_ok=True)
        for peer in args.peers.split(","):
            results[peer] = []
            keep(report, args.output)
            with console.status(f"{peer}: {args.contexts} tokens, {args.steps} steps each or more"):
                for row in run_peer(peer, folder, args, console):
                    results[peer].append(row)
                    keep(report, args.output)
    step_report.plot(report, args.output / "sft_step.png")
    show(report, console)
    console.print(f"wrote {args.output}/sft_step.json and sft_step.png")


def keep(report: dict[str, Any], folder: Path) -> None:
    """Write what has been measured so far: it is there if this run is stopped."""
    (folder / "sft_step.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def run_peer(peer: str, folder: Path, args: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """The lines that a peer's process writes, as they come, also if it does not come to its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    several = launcher if args.processes > 1 else []
    command = [sys.executable, *several, *sys.argv, "--worker", peer, "--folder", str(folder)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        is_late = threading.Event()
        timer = threading.Timer(args.timeout, lambda: (is_late.set(), process.terminate()))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"'):
                yield json.loads(line)
        status = process.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if status:
        reason = (
            f"no end within {args.timeout} s" if is_late.is_set() else (said or [f"ended with status {status}"])[-1]
        )
        console.print(f"{peer}: {reason}", style="red", markup=False)


if __name__ == "__main__":
    main()
