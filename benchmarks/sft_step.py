"""Time a step of supervised fine-tuning through TRL's SFTTrainer: expertune and its peers, each in its own process.

    python benchmarks/sft_step.py [--shape tiny|qwen3|gptoss|glm] [--layers 12] [--contexts 1024,4096]
                                  [--peers transformers,expertune,unsloth] [--rank 64] [--memory auto] [--longest]

A random-weight model of the real shape is written once and read by every peer as its own documentation says. LoRA on
the attention and on all experts, batch 1, bf16, the router frozen, checkpointing as a peer does it. 8-bit AdamW:
bitsandbytes', and for expertune its own unless `--adam bitsandbytes` says otherwise. The median of the steps after the
fourth counts; the last is profiled, and its GPU time split by part. With `--longest` the longest context that trains is
found by bisection. Writes `runs/bench/sft_step.json` with its provenance and `sft_step.png`.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console
from rich.table import Table

_QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 262144,
}
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("qwen3_moe", _QWEN3 | _TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3": ("qwen3_moe", _QWEN3),
    "gptoss": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131072,
        },
    ),
    "glm": (
        "glm4_moe_lite",
        {
            "vocab_size": 154880,
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "routed_scaling_factor": 1.8,
            "norm_topk_prob": True,
            "max_position_embeddings": 202752,
        },
    ),
}
SHAPES["gemma3"] = (  # dense, the 12B: what its attention alone is worth
    "gemma3_text",
    {
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    },
)
_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ATTENTION = {"glm": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}
EXPERTS = {"gemma3": []}
_EXPERTS = ["gate_up_proj", "down_proj"]
# by the names of kernels, in this order: what an expression finds first
PARTS = {
    "optimizer": r"kOptimizer|multi_tensor",
    "attention": r"sdpa|flash|fmha|attention",
    "experts": r"^_(linear|shrink|outer|repack|combine|count|add_up|place|forward|backward|ping_pong)\w*kernel|grouped"
    r"|enable_3x_kernel|_moe_|gather",
    "dense products": r"nvjet|gemm|cutlass|cublas|splitK",
}
_PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth")
PEERS = ("transformers", "expertune", "unsloth")


def write_model(shape: str, layers: int, folder: Path) -> None:
    """A checkpoint of random weights and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    model_type, widths = SHAPES[shape]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, **widths, **special, num_hidden_layers=layers)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def load(peer: str, args: argparse.Namespace, longest: int) -> Any:
    """The model with LoRA, as the peer's documentation says."""
    targets, experts = ATTENTION.get(args.shape, _QKVO), EXPERTS.get(args.shape, _EXPERTS)
    lora = {"r": args.rank, "lora_alpha": 2 * args.rank}
    if peer == "unsloth":
        from unsloth import FastLanguageModel  # it must be imported before Transformers

        model, _ = FastLanguageModel.from_pretrained(
            model_name=args.folder, max_seq_length=longest, load_in_4bit=False, dtype=None, local_files_only=True
        )
        settings = {"use_gradient_checkpointing": "unsloth", "lora_dropout": 0, "bias": "none"}
        return FastLanguageModel.get_peft_model(model, **lora, target_modules=targets + experts, **settings)
    if peer == "expertune":
        import expertune

        model, _ = expertune.load(args.folder, max_seq_length=longest, memory=args.memory)
        return expertune.add_lora(model, **lora, target_modules=targets + experts)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = {"": 0} if torch.cuda.is_available() else None
    faster = {"experts_implementation": "grouped_mm"} if experts else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder, device_map=device, dtype=torch.bfloat16, **faster)
    parameters = [f"mlp.experts.{name}" for name in experts]
    config = LoraConfig(**lora, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(peer: str, model: Any, args: argparse.Namespace, context: int, steps: int) -> dict[str, Any]:
    """Some steps at one context length."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    vocab = SHAPES[args.shape][1]["vocab_size"]
    ids = torch.randint(4, vocab, (steps, context), generator=torch.Generator().manual_seed(context)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * context] * steps, "labels": ids})
    clock = _clock(steps)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=context,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,  # said, because Unsloth's own default is 2
        warmup_steps=0,
        max_steps=steps,
        learning_rate=1e-4,
        logging_steps=1,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="adamw_8bit" if on_gpu else "adamw_torch",
        gradient_checkpointing=peer == "transformers",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        lr_scheduler_type="constant",
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ours = {}
    if peer == "expertune" and on_gpu and args.adam == "expertune":
        from expertune import AdamW8bit

        ours["optimizer_cls_and_kwargs"] = (AdamW8bit, {"lr": config.learning_rate})
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock], **ours
    )
    trainer.train()
    spans = clock.spans
    counted = spans[4:-1] or spans[-1:]  # of ours, the fourth step records graphs
    ms = statistics.median(counted)
    row = {
        "ms": round(ms, 1),
        "ms_min": round(min(counted), 1),
        "first_step_ms": round(spans[0], 1),
        "tokens_per_s": round(1000 * context / ms),
        "loss": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
    }
    if on_gpu:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        row["gpu_ms"] = _by_part(clock.profiler)
    return row


def _clock(steps: int) -> Any:
    """Takes the time of each step, and profiles the last."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.spans: list[float] = []
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _synchronize()
            if len(self.spans) == steps - 1 and torch.cuda.is_available():
                self.profiler.start()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _synchronize()
            self.spans.append(1000 * (time.perf_counter() - self.start))
            if len(self.spans) == steps and torch.cuda.is_available():
                self.profiler.stop()

    return Clock()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _by_part(profiler: Any) -> dict[str, float]:
    """Milliseconds of the GPU, by part."""
    from torch.autograd import DeviceType

    parts = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            part = next((name for name, names in PARTS.items() if re.search(names, event.key)), "the rest")
            parts[part] += event.self_device_time_total / 1000
    return {name: round(ms, 1) for name, ms in parts.items()}


def work(args: argparse.Namespace) -> None:
    """What the process of one peer does: a line of JSON a context."""
    contexts = [int(context) for context in args.contexts.split(",")]
    limit = SHAPES[args.shape][1]["max_position_embeddings"]
    model = load(args.worker, args, limit if args.longest else max(contexts))
    import torch

    def trained(context: int, steps: int) -> dict[str, Any] | None:
        try:
            return train(args.worker, model, args, context, steps)
        except torch.OutOfMemoryError:
            return None
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    for context in contexts:
        print(json.dumps({"context": context} | (trained(context, args.steps) or {"ms": None})), flush=True)
    if args.longest:
        fits, fails = max(contexts), limit + 1
        while fails - fits > max(1024, fits // 16):
            middle = min(2 * fits, (fits + fails) // 2) // 1024 * 1024
            fits, fails = (fits, middle) if trained(middle, 2) is None else (middle, fails)
        print(json.dumps({"longest": fits}), flush=True)


def plot(results: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Milliseconds and peak memory over the context, a line a peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5))
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_gib"), ("ms a step", "peak GiB"), strict=True):
        for peer, rows in results.items():
            points = [(row["context"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=peer)
        axes.set(xscale="log", xlabel="tokens", ylabel=label)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def show(results: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """A table: milliseconds, what others take of ours, peak memory."""
    ours = {row["context"]: row["ms"] for row in results.get("expertune", []) if "context" in row}
    contexts = sorted({row["context"] for rows in results.values() for row in rows if "context" in row})
    table = Table("peer", *(f"{context:,}" for context in contexts), title="ms a step (of expertune's) / peak GiB")
    for peer, rows in results.items():
        by_context = {row["context"]: row for row in rows if "context" in row}
        cells = []
        for context in contexts:
            row = by_context.get(context, {})
            if row.get("ms") is None:
                cells.append("out of memory" if row else "did not run")
                continue
            ratio = f" ({row['ms'] / ours[context]:.2f}x)" if ours.get(context) else ""
            cells.append(f"{row['ms']:.0f}{ratio} / {row.get('peak_gib', '?')}")
        table.add_row(peer, *cells)
    console.print(table)


def main() -> None:
    """Run each peer, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--peers", default="transformers,expertune", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--memory", default="auto", help="of expertune")
    parser.add_argument("--adam", choices=("expertune", "bitsandbytes"), default="expertune", help="of expertune")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--longest", action="store_true", help="find the longest context, too")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a peer has")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--folder", help="of the model, to keep it for the next time")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if args.worker:
        work(args)
        return
    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder or made)
        if not (folder / "config.json").is_file():
            with console.status(f"writing a model of {args.layers} layers"):
                write_model(args.shape, args.layers, folder)
        for peer in args.peers.split(","):
            with console.status(f"{peer}: {args.contexts} tokens, {args.steps} steps each"):
                results[peer] = run_peer(peer, folder, args.timeout, console)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("shape", "layers", "rank", "memory", "adam", "steps")}
    report = {"provenance": provenance(*_PACKAGES), "command": " ".join(sys.argv), **settings, "peers": results}
    (args.output / "sft_step.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(results, args.output / "sft_step.png", f"SFT step, {args.shape} shape, {args.layers} layers, r={args.rank}")
    show(results, console)
    console.print(f"wrote {args.output}/sft_step.json and sft_step.png")


def run_peer(peer: str, folder: Path, timeout: int, console: Console) -> list[dict[str, Any]]:
    """The lines that a peer's process wrote, also if it did not come to its end."""
    command = [sys.executable, *sys.argv, "--worker", peer, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        out, error = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        out, error = (late.stdout or b"").decode(), f"no end within {timeout} s"
    if error:
        console.print(f"{peer}: {error.strip().splitlines()[-1]}", style="red", markup=False)
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"')]


if __name__ == "__main__":
    main()
