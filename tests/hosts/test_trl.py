"""TRL's SFTTrainer: the loss curve of a run through the walk is stock PEFT's, and no adapter stays untrained unseen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

import expertune
from expertune.hosts.trl import GradientProof, adapters_without_gradient
from tests.cases import DEVICE
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import BACKENDS, run
from tests.hosts.trainers import sft_trainer

NUM_STEPS = 20
IS_ON_A_GPU = DEVICE.type == "cuda"  # where passes are replayed, and layers keep that there is room for
CONFIG = lora(init_lora_weights=True, target_modules=["q_proj", "o_proj"])


@pytest.fixture(scope="module")
def stock_curve(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    curves: dict[str, list[float]] = {}

    def make(family: str) -> list[float]:
        if family not in curves:
            trainer = sft_trainer(
                stock(checkpoint(family), CONFIG, torch.float32), tmp_path_factory.mktemp("stock"), NUM_STEPS
            )
            trainer.train()
            curves[family] = trainer.losses
            assert len(trainer.losses) == NUM_STEPS
            assert trainer.losses[-1] < 0.97 * trainer.losses[0], "a curve that does not fall compares nothing"
        return curves[family]

    return make


CHECKPOINTING: dict[str, tuple[str | None, dict[str, Any]]] = {
    "none": (None, {}),
    "ours": ("auto", {}),
    "trainer's, reentrant": (
        None,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "trainer's, not reentrant": (
        None,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "both": ("auto", {"gradient_checkpointing": True}),
    "ours keeps": ("fast", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("memory", "settings"), CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_the_loss_curve_is_stock_pefts(
    checkpoint: Checkpoint,
    tmp_path: Path,
    walks: list[str],
    stock_curve: Callable[[str], list[float]],
    backend: str,
    memory: str | None,
    settings: dict[str, Any],
) -> None:
    model = stock(checkpoint("qwen3_moe"), CONFIG, torch.float32)
    trainer = sft_trainer(expertune.optimize(model, backend=backend, memory=memory), tmp_path, NUM_STEPS, **settings)
    trainer.add_callback(GradientProof())
    trainer.train()
    assert trainer.losses == pytest.approx(stock_curve("qwen3_moe"), rel=1e-5)
    passes = 1 if memory == "fast" or not (memory or settings) else 2
    assert set(walks) == {backend}
    assert len(walks) == passes * 2 * NUM_STEPS or IS_ON_A_GPU


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_the_loss_curve_of_other_families(
    checkpoint: Checkpoint, tmp_path: Path, walks: list[str], stock_curve: Callable[[str], list[float]], family: str
) -> None:
    model = stock(checkpoint(family), CONFIG, torch.float32)
    trainer = sft_trainer(expertune.optimize(model, memory="auto"), tmp_path, NUM_STEPS)
    trainer.train()
    assert trainer.losses == pytest.approx(stock_curve(family), rel=1e-5)
    assert walks


@pytest.mark.parametrize("memory", [None, "auto"])
@pytest.mark.parametrize("when", ["before the trainer", "after the trainer"])
def test_an_adapter_made_by_the_trainer_is_consumed(
    checkpoint: Checkpoint,
    tmp_path: Path,
    walks: list[str],
    stock_curve: Callable[[str], list[float]],
    when: str,
    memory: str | None,
) -> None:
    """`SFTTrainer(peft_config=…)` wraps the model itself."""
    same = stock(checkpoint("qwen3_moe"), CONFIG, torch.float32).state_dict()
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32)
    if when == "before the trainer":
        expertune.optimize(model, memory=memory)
    trainer = sft_trainer(model, tmp_path, NUM_STEPS, peft_config=CONFIG)
    assert isinstance(trainer.model, PeftModel)
    if when == "after the trainer":
        expertune.optimize(trainer.model, memory=memory)
    trainer.model.load_state_dict(same)
    trainer.add_callback(GradientProof())
    trainer.train()
    assert trainer.losses == pytest.approx(stock_curve("qwen3_moe"), rel=1e-5)
    assert len(walks) == (4 if memory else 2) * NUM_STEPS or (walks and IS_ON_A_GPU)


def _deaf(wrapper: ParamWrapper) -> None:
    """Break it: a forward that goes to the experts past the adapter."""
    experts = wrapper.get_base_layer()
    wrapper.forward = experts.forward  # type: ignore[method-assign]


class TestGradientProof:
    def _break_one_layer(self, model: Any) -> None:
        model(**{name: x.to(model.device) for name, x in batch().items()})  # wrappers are bound
        _deaf(model.base_model.model.model.layers[1].mlp.experts)

    def test_stops_a_run_whose_adapter_gets_no_gradient(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32))
        self._break_one_layer(model)
        trainer = sft_trainer(model, tmp_path, num_steps=2, callbacks=[GradientProof()])
        words = r"2 adapters received no gradient in the first step: model\.layers\.1\.mlp\.experts\."
        with pytest.raises(RuntimeError, match=words):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_stops_it_after_a_resume_too(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32))
        sft_trainer(model, tmp_path, num_steps=2, save_strategy="steps", save_steps=1).train()
        self._break_one_layer(model)
        trainer = sft_trainer(model, tmp_path, num_steps=4, callbacks=[GradientProof()])
        with pytest.raises(RuntimeError, match="2 adapters received no gradient"):
            trainer.train(resume_from_checkpoint=True)

    def test_waits_for_the_whole_accumulated_step(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32))
        settings = {"gradient_accumulation_steps": 2, "callbacks": [GradientProof()]}
        sft_trainer(model, tmp_path, num_steps=1, **settings).train()

    def test_looks_once_a_run(self, checkpoint: Checkpoint) -> None:
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG))
        proof, host = GradientProof(), {"args": None, "state": None, "control": None}
        run(model, batch())
        proof.on_pre_optimizer_step(*host.values(), model=model)
        model.zero_grad()
        proof.on_pre_optimizer_step(*host.values(), model=model)
        proof.on_train_begin(*host.values(), model=model)
        with pytest.raises(RuntimeError, match="received no gradient"):
            proof.on_pre_optimizer_step(*host.values(), model=model)

    def test_stops_a_run_that_trains_nothing(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        """As PEFT reads an adapter, unless it is told that it is to be trained."""
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG, torch.float32), memory="auto")
        trainer = sft_trainer(model, tmp_path, num_steps=2, callbacks=[GradientProof()])
        model.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"nothing of this model is trained.*is_trainable=True"):
            trainer.train()

    def test_stops_a_run_none_of_whose_tensors_gets_a_gradient(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        model = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32), memory="auto")
        model.requires_grad_(False)
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        trainer = sft_trainer(model, tmp_path, num_steps=2, callbacks=[GradientProof()])
        with pytest.raises(RuntimeError, match=r"none of the 1 trained tensors received a gradient"):
            trainer.train()

    def test_an_expert_without_tokens_is_no_error(self, checkpoint: Checkpoint) -> None:
        """Two tokens reach at most four of eight experts; the adapters of the others get none, and need none."""
        model = expertune.optimize(stock(checkpoint("qwen3_moe"), CONFIG))
        grads = run(model, batch(num_rows=1, length=5))
        unseen = [
            name
            for name, grad in grads.items()
            if "experts" in name and "lora_B" in name and not grad.reshape(grad.shape[0], -1, 8).any(0).any(0).all()
        ]
        assert unseen, "every expert saw a token"
        assert adapters_without_gradient(model) == []

    def test_names_what_is_silent(self, checkpoint: Checkpoint) -> None:
        model = expertune.optimize(stock(checkpoint("gpt_oss"), CONFIG))
        run(model, batch())
        attention: Any = model.base_model.model.model.layers[0].self_attn.o_proj
        attention.lora_B["default"].weight.grad = None
        attention.lora_A["default"].weight.grad.zero_()
        assert adapters_without_gradient(model) == ["model.layers.0.self_attn.o_proj"]
        for parameter in attention.parameters():
            parameter.requires_grad_(False)
        assert adapters_without_gradient(model) == []
