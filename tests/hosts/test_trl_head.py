"""TRL's forward with our log-probabilities: the same losses and metrics as with its own, and undone with the rest."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.utils
from packaging.version import Version
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

import expertune
from expertune.hosts import trl_head
from expertune.loss import load_balancing, log_probs
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import DENSE, SHARED, load_tiny
from tests.hosts.trainers import sft_trainer

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="TRL computes the loss from all logits there"
)
CONFIG = lora(init_lora_weights=True, target_modules=["q_proj", "o_proj"])
NUM_STEPS = 6
HAS_COEF = "router_aux_loss_coef" in {each.name for each in dataclasses.fields(SFTConfig)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call of ours, so that a test knows that it did not compare TRL with TRL."""
    seen: list[int] = []

    def spy(hidden_ND: Tensor, *args: Any) -> Any:
        seen.append(len(hidden_ND))
        return log_probs.label_log_probs(hidden_ND, *args)

    monkeypatch.setattr(trl_head, "label_log_probs", spy)
    return seen


@pytest.fixture
def balances(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of each call of our balance loss."""
    seen: list[int] = []

    def spy(gate_logits: tuple[Tensor, ...], *args: Any) -> Any:
        seen.append(len(gate_logits))
        return balance(gate_logits, *args)

    balance = load_balancing.load_balancing_loss_func
    monkeypatch.setattr(load_balancing, "load_balancing_loss_func", spy)
    return seen


def logs(trainer: SFTTrainer, *keys: str) -> dict[str, list[float]]:
    return {key: [log[key] for log in trainer.state.log_history if key in log] for key in keys}


SETTINGS: tuple[dict[str, Any], ...] = ({}, {"loss_type": "dft"}, {"per_device_train_batch_size": 1})


@pytest.mark.parametrize(
    ("family", "settings", "takes_rows"),
    [  # capped logits with each setting, and all settings of the trainer without
        pytest.param(
            family,
            settings,
            takes_rows,
            marks=pytest.mark.thorough if family in DENSE and takes_rows is (settings == {}) else (),
            id=f"{family}-{settings}-{takes_rows}",
        )
        for family in ("qwen3_moe", "gemma3_text")
        for settings in SETTINGS
        for takes_rows in (False, True)
    ],
)
def test_losses_and_metrics_are_trls(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],
    balances: list[int],
    family: str,
    settings: dict[str, Any],
    takes_rows: bool,
) -> None:
    """With experts and without; Gemma caps its logits here. Of all tokens, or of those with a label, as on a GPU."""
    has_balance = family not in DENSE
    settings = settings | ({"router_aux_loss_coef": 0.5} if has_balance and HAS_COEF else {})
    overrides = {"final_logit_softcapping": 2.0} if family in DENSE else {}
    trainers = []
    for is_ours in (False, True):
        model = stock(checkpoint(family, **overrides), CONFIG, torch.float32)
        if is_ours:
            expertune.optimize(model)
            if takes_rows:
                monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda _device: True, raising=False)
        trainer = sft_trainer(model, tmp_path, NUM_STEPS, logging_steps=1, **settings)
        trainer.train()
        assert len(calls) == (NUM_STEPS if is_ours else 0)
        assert len(balances) == (len(calls) if has_balance and HAS_COEF else 0)
        trainers.append(trainer)
    theirs, ours = (logs(trainer, "loss", "grad_norm", "entropy", "mean_token_accuracy") for trainer in trainers)
    for key, values in theirs.items():
        assert len(values) == NUM_STEPS
        assert ours[key] == pytest.approx(values, rel=2e-4), key  # logs are rounded to four digits


@pytest.mark.parametrize("memory", ["lean", "auto"])
def test_a_lean_model_holds_fewer_logits_at_the_end_and_a_long_step_sets_none_aside(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    lasts: list[int] = []

    def spy(hidden_ND: Tensor, label_N: Tensor, head: log_probs.Head, last: int) -> Any:
        lasts.append(last)
        return log_probs.label_log_probs(hidden_ND, label_N, head, last)

    monkeypatch.setattr(trl_head, "label_log_probs", spy)
    model = stock(checkpoint("qwen3_moe"), CONFIG, torch.float32)
    expertune.optimize(model, memory=memory)
    sft_trainer(model, tmp_path, 2).train()
    monkeypatch.setattr(trl_head, "_MOST_TOKENS", 1)
    sft_trainer(model, tmp_path, 2).train()
    assert lasts == [1024 if memory == "lean" else 2048] * 2 + [0] * 2


def test_a_function_that_takes_something_else_stays_trls(
    checkpoint: Checkpoint, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of another version may."""
    model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32))
    monkeypatch.setattr(trl_head, "_TAKES", trl_head._TAKES[:-1])
    sft_trainer(model, tmp_path, 1).train()
    assert not calls


def test_a_head_that_is_trained_stays_trls(checkpoint: Checkpoint, tmp_path: Path, calls: list[int]) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))
    before = model.lm_head.weight.detach().clone()
    sft_trainer(model, tmp_path, 3).train()
    assert trl_head.is_bound(model)
    assert not calls
    assert not torch.equal(model.lm_head.weight.cpu(), before.cpu())


def test_an_evaluation_and_a_second_trainer(checkpoint: Checkpoint, tmp_path: Path, calls: list[int]) -> None:
    model = stock(checkpoint("qwen3_moe"), CONFIG, torch.float32)
    for num_before in (0, 3):
        trainer = sft_trainer(expertune.optimize(model), tmp_path, 2)
        trainer.train()
        assert len(calls) == num_before + 2
        loss = trainer.evaluate(trainer.train_dataset.select(range(2)))["eval_loss"]
        assert len(calls) == num_before + 3
        expertune.restore(model)
        assert trainer.evaluate(trainer.train_dataset.select(range(2)))["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert len(calls) == num_before + 3


def test_it_is_undone_and_leaves_the_signature(checkpoint: Checkpoint, tmp_path: Path, calls: list[int]) -> None:
    model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32))
    inner = model.get_base_model()
    trainer = sft_trainer(model, tmp_path, 2)
    trls = inner.forward
    assert "loss: TRL's" not in str(expertune.explain(model))
    trainer.train()
    assert "loss: TRL's" in str(expertune.explain(model))
    assert inspect.signature(inner.forward) == inspect.signature(trls)
    ids = torch.randint(3, SHARED["vocab_size"], (1, 5)).to(inner.device)
    assert inner.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 7)
    expertune.restore(model)
    assert inner.forward == trls
    assert len(calls) == 2

    trainer.train()  # nobody looks for that forward any more
    assert inner.forward == trls


@pytest.mark.parametrize("wraps", ["expertune", "the trainer", "nobody"])
def test_the_first_step_is_ours(checkpoint: Checkpoint, tmp_path: Path, calls: list[int], wraps: str) -> None:
    model: Any = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32).requires_grad_(False))
    settings = {"peft_config": CONFIG} if wraps == "the trainer" else {}
    if wraps == "expertune":
        model = expertune.add_lora(model, target_modules=["q_proj"])
    if wraps == "nobody":
        model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    sft_trainer(model, tmp_path, 1, **settings).train()
    assert len(calls) == 1


def test_a_model_with_a_forward_of_another_kind_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    trl_head.bind(model)
    model.forward = lambda x: x
    trl_head.bind(model)
    trl_head.unbind(model)
    assert model.forward(3) == 3
    assert not trl_head.is_bound(model)
