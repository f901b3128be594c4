"""Gradients clipped within the step: a run is bit for bit the one whose trainer clips them before."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

import expertune
from tests.cases import DEVICE
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny
from tests.hosts.trainers import Recording, sft_trainer

OURS = (expertune.AdamW8bit, {"lr": 2e-3})


class Norms(TrainerCallback):
    """Keeps the norm of the gradients that the optimizer is to read."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(grads)))


def trained(checkpoint: Checkpoint, folder: Path, *, in_step: bool, **settings: Any) -> tuple[Recording, Norms]:
    torch.manual_seed(0)
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    norms = Norms()
    trainer = sft_trainer(
        model,
        folder,
        3,
        peft_config=lora,
        callbacks=[norms],
        logging_steps=1,
        gradient_accumulation_steps=2,
        **settings,
    )
    if in_step:
        expertune.clip_in_step(trainer)
    trainer.train()
    return trainer, norms


def logged(trainer: Recording) -> list[float]:
    return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]


def parameters(trainer: Recording) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3, 0.0], ids=["clipped", "too small to clip", "never"])
def test_a_run_is_the_same_and_gradients_stay(checkpoint: Checkpoint, tmp_path: Path, max_grad_norm: float) -> None:
    how = {"optimizer_cls_and_kwargs": OURS, "max_grad_norm": max_grad_norm}
    (before, clipped), (ours, kept) = (
        trained(checkpoint, tmp_path, in_step=in_step, **how) for in_step in (False, True)
    )
    if max_grad_norm == 1e-3 and DEVICE.type == "cuda":  # our kernel adds up in another order than torch
        assert ours.losses == pytest.approx(before.losses, rel=1e-5)
        torch.testing.assert_close(parameters(ours), parameters(before), rtol=0, atol=0.1 * OURS[1]["lr"])
    else:
        assert ours.losses == before.losses
        assert all(map(torch.equal, parameters(ours), parameters(before)))
    assert logged(ours) == pytest.approx(logged(before), rel=1e-5 if DEVICE.type == "cuda" else 0)
    assert len(kept.seen) == 3
    if max_grad_norm == 1e-3:
        assert max(clipped.seen) <= 1.01e-3 < min(kept.seen)


def test_what_another_optimizer_reads_is_clipped_before(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, norms = trained(checkpoint, tmp_path, in_step=True, max_grad_norm=1e-3, optim="adamw_torch")
    assert max(norms.seen) <= 1.01e-3


@pytest.mark.parametrize("given", [None, torch.nn.Linear(1, 1)])
def test_what_is_no_trainer_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a trainer of Transformers or TRL, got (NoneType|Linear)"):
        expertune.clip_in_step(given)


def test_another_norm_is_the_hosts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trainer, _ = trained(checkpoint, tmp_path, in_step=True, optimizer_cls_and_kwargs=OURS)
    parameter = parameters(trainer)[0]
    parameter.grad = torch.full_like(parameter, 2.0)
    assert trainer.accelerator.clip_grad_norm_([parameter], 1.0, norm_type=math.inf) == 2
    assert float(parameter.grad.max()) == pytest.approx(1.0)
