"""TRL's trainer on a tiny model and rows that can be learned."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from tests.hosts.models import SHARED, tokenizer


def dataset() -> Dataset:
    """Rows of different lengths, so that batches are padded; each counts upwards from a random token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(4, 14, (24,), generator=generator).tolist():
        start = int(torch.randint(3, 40, (1,), generator=generator))
        rows.append({"input_ids": [3 + (start + i) % 60 for i in range(length)]})
    return Dataset.from_list(rows)


class Recording(SFTTrainer):
    """Keeps each step's loss unrounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def arguments(folder: Path, num_steps: int) -> dict[str, Any]:
    """What TRL's trainers are told alike."""
    return {
        "output_dir": str(folder),
        "max_steps": num_steps,
        "per_device_train_batch_size": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),  # TRL 1.16 launches Triton on tensors of the CPU there
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }


def sft_trainer(model: nn.Module, folder: Path, num_steps: int, **settings: Any) -> Recording:
    extra = {
        key: settings.pop(key) for key in ("peft_config", "callbacks", "optimizer_cls_and_kwargs") if key in settings
    }
    return Recording(
        model=model,
        args=SFTConfig(**arguments(folder, num_steps) | settings),
        train_dataset=dataset(),
        processing_class=tokenizer(SHARED["vocab_size"]),
        **extra,
    )
