"""What the process of one peer does in `sft_step.py`: load the model as the peer says, take steps, time them."""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from idle import Run, idle
from parts import sum_by_part
from shapes import SHAPES, attention_targets, expert_targets, longest_context

PEERS = ("transformers", "expertune", "unsloth")
ROWS = ("whole", "packed", "padded")
_PADDED_TO = 128  # tokens, whose multiples the lengths of our padded batches are, as README says
# steps that do not count: ours records layers in the fourth of a kind, and padded batches are of several
_NUM_WARM = {"whole": 4, "packed": 8, "padded": 16}
# of this process, each of which has a GPU of its own; the first one prints
_RANK, _NUM_PROCESSES = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def work(peer: str, args: argparse.Namespace) -> None:
    """Print a line of JSON a context and, if asked for, one with the longest that trains."""
    contexts = [int(context) for context in args.contexts.split(",")]
    limit = longest_context(args.shape)
    model = load(peer, args, limit if args.longest else max(contexts))
    import torch

    def trained(context: int, steps: int) -> dict[str, Any] | None:
        try:
            return train(peer, model, args, context, steps)
        except torch.OutOfMemoryError:
            return None
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    fits = 0
    for context in contexts:
        row = trained(context, num_steps(context, args.steps, args.rows))
        fits = max(fits, context) if row else fits
        if _RANK == 0:
            print(json.dumps({"context": context} | (row or {"ms": None})), flush=True)
    if args.longest:
        found = longest(lambda context: trained(context, 2) is not None, fits, limit)
        print(json.dumps({"longest": found}), flush=True)


def num_steps(context: int, least: int, rows: str = "whole") -> int:
    """Of a context; see `sft_step.py`."""
    import torch

    more = min(32, 32768 // context) + _NUM_WARM[rows] - _NUM_WARM["whole"]
    return least + (more if torch.cuda.is_available() else 0)


def longest(trains: Callable[[int], bool], fits: int, limit: int, grain: int = 1024) -> int:
    """The most tokens, in whole grains beyond `fits`, that train; found within a sixteenth or a grain.

    Args:
        trains: whether a context trains.
        fits: a context that does, or 0.
        limit: the most tokens that are tried.
        grain: tokens.
    """
    good, bad = fits // grain, limit // grain + 1  # in grains
    while bad - good > max(1, good // 16):
        middle = min(max(2 * good, 1), (good + bad) // 2)
        good, bad = (middle, bad) if trains(middle * grain) else (good, middle)
    return max(fits, good * grain)


def load(peer: str, args: argparse.Namespace, max_seq_length: int) -> Any:
    """The model with LoRA, as the peer's documentation says."""
    targets, experts = attention_targets(args.shape), expert_targets(args.shape)
    lora = {"r": args.rank, "lora_alpha": 2 * args.rank}
    if peer == "unsloth":
        from unsloth import FastLanguageModel  # it must be imported before Transformers

        model, _ = FastLanguageModel.from_pretrained(
            model_name=args.folder, max_seq_length=max_seq_length, load_in_4bit=False, dtype=None, local_files_only=True
        )
        settings = {"use_gradient_checkpointing": "unsloth", "lora_dropout": 0, "bias": "none"}
        return FastLanguageModel.get_peft_model(model, **lora, target_modules=targets + experts, **settings)
    if peer == "expertune":
        import expertune

        model, _ = expertune.load(args.folder, max_seq_length=max_seq_length, memory=args.memory)
        how = {"autocast_adapter_dtype": args.adapter_dtype == "float32"}
        return expertune.add_lora(model, **lora, target_modules=targets + experts, **how)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = {"": _RANK} if torch.cuda.is_available() else None
    faster = {"experts_implementation": args.experts} if experts else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder, device_map=device, dtype=torch.bfloat16, **faster)
    parameters = [f"mlp.experts.{name}" for name in experts]
    config = LoraConfig(**lora, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(peer: str, model: Any, args: argparse.Namespace, context: int, steps: int) -> dict[str, Any]:
    """Some steps at one context length."""
    import torch
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    on_gpu = torch.cuda.is_available()
    data = _data(args, context, steps)
    clock = _clock(steps)
    config = _config(peer, args, context, steps)
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
    if ours:
        import expertune

        expertune.clip_in_step(trainer)
    try:
        trainer.train()
    finally:
        clock.close()
        shutil.rmtree(config.output_dir, ignore_errors=True)
    spans = clock.spans
    counted = spans[_NUM_WARM[args.rows] : -1] or spans[-1:]
    ms = statistics.median(counted)
    num_tokens = sum(map(len, data["input_ids"])) / steps
    row = {
        "ms": round(ms, 1),
        "ms_min": round(min(counted), 1),
        "first_step_ms": round(spans[0], 1),
        "tokens_per_s": round(1000 * num_tokens / ms),
        "loss": [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log],
    }
    if peer == "expertune":
        row["graphs"] = _recorded(model)
    if on_gpu:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        row["part_ms"] = _by_part(clock.profiler)
        row["idle_ms"] = _idle(clock.profiler, spans[-1])
    return row


def _data(args: argparse.Namespace, context: int, steps: int) -> Any:
    """Random ids: a row a step, of one sample or of several as TRL packs them, or samples that TRL pads."""
    import torch
    from datasets import Dataset

    random = torch.Generator().manual_seed(context)
    vocab = SHAPES[args.shape][1]["vocab_size"]
    if args.rows == "padded":
        shortest, longest = args.sample
        num_rows = _NUM_PROCESSES * steps * batch_size(args.rows, context, longest)
        lengths = torch.randint(shortest, longest + 1, (num_rows,), generator=random).tolist()
    else:
        lengths = [context] * steps * _NUM_PROCESSES
    ids = [torch.randint(4, vocab, (length,), generator=random).tolist() for length in lengths]
    beside = {}
    if args.rows == "packed":
        beside["seq_lengths"] = [sample_lengths(context, args.sample, random) for _ in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, **beside})


def batch_size(rows: str, context: int, longest: int) -> int:
    """Rows a step, of samples of at most so many tokens."""
    return max(1, context // (longest + 1)) if rows == "padded" else 1


def sample_lengths(context: int, sample: tuple[int, int], random: Any) -> list[int]:
    """Of samples that fill a context, of so many tokens from and to; the last is what remains."""
    import torch

    lengths: list[int] = []
    while (rest := context - sum(lengths)) > 0:
        lengths.append(min(rest, int(torch.randint(sample[0], sample[1] + 1, (), generator=random))))
    return lengths


def _config(peer: str, args: argparse.Namespace, context: int, steps: int) -> Any:
    """The trainer's settings."""
    import torch
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=context,
        packing=args.rows == "packed",
        pad_to_multiple_of=_PADDED_TO if peer == "expertune" and args.rows == "padded" else None,
        per_device_train_batch_size=batch_size(args.rows, context, args.sample[1]),
        gradient_accumulation_steps=1,  # said, because Unsloth's own default is 2
        warmup_steps=0,
        max_steps=steps,
        learning_rate=1e-4,
        logging_steps=1,
        # the check waits for backward before anything that follows can be submitted
        logging_nan_inf_filter=args.adam == "bitsandbytes",
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


def _recorded(model: Any) -> str | None:
    """What of the model was replayed as CUDA graphs, in words."""
    import expertune

    return expertune.explain(model).graphs


def _clock(steps: int) -> Any:
    """Takes the time of each step, and profiles the last."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.spans: list[float] = []
            self.is_profiling = False
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _synchronize()
            if len(self.spans) == steps - 1 and torch.cuda.is_available():
                self.is_profiling = True
                self.profiler.start()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _synchronize()
            self.spans.append(1000 * (time.perf_counter() - self.start))
            self.close()

        def close(self) -> None:
            """End the profile, also where its step failed."""
            if self.is_profiling:
                self.is_profiling = False
                self.profiler.stop()

    return Clock()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _by_part(profiler: Any) -> dict[str, float]:
    """Milliseconds of the GPU, by part."""
    events = _on_gpu(profiler.key_averages())
    return sum_by_part([(event.key, event.self_device_time_total / 1000) for event in events])


def _idle(profiler: Any, step_ms: float) -> dict[str, Any]:
    """Where the GPU waited in the step that was profiled."""
    events = _on_gpu(profiler.events())
    return idle([Run(e.time_range.start, e.time_range.end, e.name) for e in events], step_ms)


def _on_gpu(events: Iterable[Any]) -> list[Any]:
    """What ran there, of a profile."""
    from torch.autograd import DeviceType

    return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
