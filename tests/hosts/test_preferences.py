"""TRL's trainers of preferences and rewards: their losses through the walk are stock PEFT's, layers replayed or not.

Both ask the model without its adapters for a reference: DPO between forward and backward, GRPO before them, after it
has let the model write.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import expertune
from tests.conftest import Checkpoint
from tests.graphs.replayed import FakeCapture
from tests.hosts.adapters import lora, stock
from tests.hosts.models import SHARED, tokenizer
from tests.hosts.recorded import recorder_of
from tests.hosts.trainers import arguments

NUM_STEPS = 6
NUM_ROWS, LENGTH = 2, 4
CONFIG = lora(target_modules=["q_proj", "o_proj"])


def words(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"<{i}>" for i in torch.randint(3, SHARED["vocab_size"], (LENGTH,), generator=generator))


def num_even(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(ord(letter) % 2 for letter in completion)) for completion in completions]


def settings(folder: Path) -> dict[str, Any]:
    ours = {"per_device_train_batch_size": NUM_ROWS, "learning_rate": 2e-2, "logging_steps": 1}
    return arguments(folder, NUM_STEPS) | ours


def dpo(model: nn.Module, folder: Path) -> Trainer:
    rows = [{"prompt": words(3 * i), "chosen": words(3 * i + 1), "rejected": words(3 * i + 2)} for i in range(12)]
    return DPOTrainer(model, args=DPOConfig(**settings(folder)), **given(rows))


def grpo(model: nn.Module, folder: Path) -> Trainer:
    writing = {"num_generations": NUM_ROWS, "max_completion_length": LENGTH, "beta": 0.1}
    args = GRPOConfig(**settings(folder), **writing, generation_kwargs={"min_new_tokens": LENGTH})
    return GRPOTrainer(model, num_even, args=args, **given([{"prompt": words(i)} for i in range(12)]))


def given(rows: list[dict[str, str]]) -> dict[str, Any]:
    processing = tokenizer(SHARED["vocab_size"])
    processing.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return {"train_dataset": Dataset.from_list(rows), "processing_class": processing}


def curve(trainer: Trainer) -> list[list[float]]:
    """Loss and norm of the gradients of each step."""
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == NUM_STEPS
    return [[float(log["loss"]), float(log["grad_norm"])] for log in steps]


@pytest.mark.parametrize("make", [dpo, grpo])
def test_curves_are_stock_pefts(checkpoint: Checkpoint, tmp_path: Path, make: Any) -> None:
    folder, capture = checkpoint("qwen3_moe"), FakeCapture()
    truth = curve(make(stock(folder, CONFIG, torch.float32), tmp_path))
    assert len({loss for loss, _ in truth}) > 1
    for memory in ("auto", "fast"):  # layers that run again, and layers that keep
        capture.replays = 0
        model = expertune.optimize(stock(folder, CONFIG, torch.float32), memory=memory, graphs=True)
        recorder_of(model)._pool_of = capture.pool
        assert torch.allclose(torch.tensor(curve(make(model, tmp_path))), torch.tensor(truth), rtol=1e-3, atol=1e-5)
        assert capture.replays == (NUM_STEPS - 2) * 2 * 2  # forward and backward of two layers
