"""Adapters on experts through the walk against stock PEFT on the same weights: logits, loss, every gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import EXPERTS, lora, stock, wrap
from tests.hosts.fingerprints import fingerprint
from tests.hosts.models import CONFIGS, batch, load_tiny
from tests.hosts.passes import BACKENDS, assert_equal_within, on_the_truths_routes, run
from tests.numerics import assert_no_worse

ROUNDING = 1e-12


def _wrapped_then_optimized(folder: Path, config: LoraConfig, _tmp: Path) -> PeftModel:
    return expertune.optimize(wrap(load_tiny(folder), config))


def _optimized_then_wrapped(folder: Path, config: LoraConfig, _tmp: Path) -> PeftModel:
    return wrap(expertune.optimize(load_tiny(folder)), config)


def _loaded_then_optimized(folder: Path, config: LoraConfig, tmp: Path) -> PeftModel:
    stock(folder, config).save_pretrained(tmp)
    return expertune.optimize(PeftModel.from_pretrained(load_tiny(folder), tmp, is_trainable=True))


def _optimized_then_loaded(folder: Path, config: LoraConfig, tmp: Path) -> PeftModel:
    stock(folder, config).save_pretrained(tmp)
    return PeftModel.from_pretrained(expertune.optimize(load_tiny(folder)), tmp, is_trainable=True)


WAYS: dict[str, Callable[[Path, LoraConfig, Path], PeftModel]] = {
    "wrapped, then optimized": _wrapped_then_optimized,
    "optimized, then wrapped": _optimized_then_wrapped,
    "loaded, then optimized": _loaded_then_optimized,
    "optimized, then loaded": _optimized_then_loaded,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_is_consumed_however_it_came(
    checkpoint: Checkpoint, tmp_path: Path, walks: list[str], family: str, way: Any
) -> None:
    folder = checkpoint(family)
    truth = run(stock(folder, lora()), batch())
    model = way(folder, lora(), tmp_path)
    assert not walks
    assert_equal_within(run(model, batch()), truth, ROUNDING)
    assert len(walks) == len(expertune.explain(model).layers)


@pytest.mark.parametrize("family", CONFIGS)
def test_add_lora_equals_stock_peft_of_the_same_config(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    folder = checkpoint(family)
    torch.manual_seed(0)
    model = expertune.add_lora(load_tiny(folder), r=3, lora_alpha=5, init_lora_weights=False)
    theirs = stock(folder, model.peft_config["default"])
    theirs.load_state_dict(model.state_dict())
    assert_equal_within(run(model, batch()), run(theirs, batch()), ROUNDING)
    assert walks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_with_float32_adapters_is_no_worse_than_stock(
    checkpoint: Checkpoint, family: str, backend: str
) -> None:
    """As PEFT trains: the base in bfloat16, the factors in float32."""
    folder = checkpoint(family)
    plain = stock(folder, lora(), torch.bfloat16)
    exact = stock(folder, lora(), torch.bfloat16).double()
    model = expertune.optimize(stock(folder, lora(), torch.bfloat16), backend=backend)
    for name, (ours, theirs, truth) in on_the_truths_routes(exact, model, plain).items():
        assert ours.dtype == theirs.dtype
        assert_no_worse(ours.to(torch.bfloat16), theirs, truth, name)


SETTINGS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {r".*\.experts\.gate_up_proj": 2, r".*layers\.0\..*down_proj": 5},
        "alpha_pattern": {r".*\.experts\.down_proj": 3},
    },
    "gate_up alone": {"target_parameters": EXPERTS[:1]},
    "down alone": {"target_parameters": EXPERTS[1:]},
    "the user's order is not the module's": {"target_parameters": EXPERTS[::-1]},
    "some layers by path": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "router": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "router saved whole": {"modules_to_save": ["gate"]},
    "head and norms saved whole": {"modules_to_save": ["lm_head", "norm"]},
    "all-linear, as PEFT reads it": {"target_modules": "all-linear", "target_parameters": None},
    "rank 1": {"r": 1},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_peft_mean_what_they_mean_there(
    checkpoint: Checkpoint, walks: list[str], settings: dict[str, Any]
) -> None:
    folder = checkpoint("qwen3_moe")
    try:
        theirs = stock(folder, lora(**settings))
    except ValueError as refusal:
        pytest.skip(f"this PEFT refuses it: {refusal}")
    ours = expertune.optimize(stock(folder, lora(**settings)))
    assert_equal_within(run(ours, batch()), run(theirs, batch()), ROUNDING)
    assert walks


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_experts_saved_whole_are_trained_by_the_walk(checkpoint: Checkpoint, walks: list[str], family: str) -> None:
    """`modules_to_save=["experts"]`: PEFT trains a copy of them, with the biases of gpt-oss."""
    config = lora(target_parameters=None, modules_to_save=["experts"])
    for way in (WAYS["wrapped, then optimized"], WAYS["optimized, then wrapped"]):
        theirs = stock(checkpoint(family), config)
        ours = way(checkpoint(family), config, Path())
        walks.clear()
        truth = run(theirs, batch())
        assert_equal_within(run(ours, batch()), truth, ROUNDING)
        assert len(walks) == 2
        assert expertune.trained(ours).kinds()["routed experts"] > 0
        assert len(expertune.explain(ours).layers) == 2
        walks.clear()
        assert_equal_within(run(expertune.restore(ours), batch()), truth, 0)
        assert not walks


def test_biases_of_experts_trained_beside_an_adapter(checkpoint: Checkpoint) -> None:
    theirs, ours = (stock(checkpoint("gpt_oss"), lora()) for _ in range(2))
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if name.endswith(("down_proj_bias", "gate_up_proj_bias")):
                parameter.requires_grad_()
    assert_equal_within(run(expertune.optimize(ours), batch()), run(theirs, batch()), ROUNDING)


def test_restore_gives_stock_peft_back(checkpoint: Checkpoint, walks: list[str]) -> None:
    theirs, ours = (stock(checkpoint("qwen3_moe"), lora()) for _ in range(2))
    run(expertune.optimize(ours, memory="auto"), batch())
    walks.clear()
    assert_equal_within(run(expertune.restore(ours), batch()), run(theirs, batch()), 0)
    assert not walks


@pytest.mark.parametrize("way", ["block", "experts", "layer"])
def test_experts_called_without_the_model_never_lose_their_adapter(checkpoint: Checkpoint, way: str) -> None:
    """Wrapped after `optimize`, and no pass of the model yet in which the wrapper could be taken in."""
    model = expertune.optimize(load_tiny(checkpoint("gpt_oss")))
    wrap(model, lora())
    block: Any = model.model.layers[0].mlp
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.mlp\.experts.*parametrized: by an adapter that.*expertune\.optimize"
    ):
        block(x) if way == "block" else block.experts(x[0], torch.zeros(5, 1, dtype=torch.long), x[0, :, :1])


def test_a_parametrization_of_expert_weights_is_refused(checkpoint: Checkpoint) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    parametrize.register_parametrization(model.model.layers[1].mlp.experts, "down_proj", Doubled())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts.*parametrized: by an adapter that"):
        model(**batch())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*parametrized weights"):
        expertune.optimize(model)


def test_an_injected_adapter_is_consumed(checkpoint: Checkpoint, walks: list[str]) -> None:
    theirs, ours = load_tiny(checkpoint("qwen3_moe")), expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    for model in (theirs, ours):
        torch.manual_seed(3)
        inject_adapter_in_model(lora(), model)
    assert_equal_within(run(ours, batch()), run(theirs, batch()), ROUNDING)
    assert walks


def test_an_adapter_on_a_bias_of_experts_is_refused(checkpoint: Checkpoint) -> None:
    config = lora(target_parameters=["mlp.experts.down_proj_bias"])
    model = stock(checkpoint("gpt_oss"), config)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj_bias.*cannot adapt.*gate_up_proj or down_proj"):
        expertune.optimize(model)
    assert fingerprint(model) == before
    late = wrap(expertune.optimize(load_tiny(checkpoint("gpt_oss"))), config)
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj_bias.*cannot adapt"):
        late(**batch())


def test_adapters_mixed_within_a_batch_are_refused(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(stock(checkpoint("qwen3_moe"), lora())).eval()
    with pytest.raises(ValueError, match="cannot be mixed within a batch"):
        model(**batch(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("auto", "task", "head"),
    [
        (AutoModelForSequenceClassification, "SEQ_CLS", "score"),
        (AutoModelForTokenClassification, "TOKEN_CLS", "score"),
        (AutoModelForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_a_head_of_its_own_is_trained_and_saved(
    checkpoint: Checkpoint, tmp_path: Path, auto: Any, task: str, head: str
) -> None:
    model = expertune.add_lora(auto.from_pretrained(checkpoint("qwen3_moe")), r=2)
    assert model.peft_config["default"].task_type == task
    assert any(p.requires_grad for name, p in model.named_parameters() if head in name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(head in name for name in saved)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_may_have_any_name(checkpoint: Checkpoint, walks: list[str], name: str) -> None:
    truth, ours = (load_tiny(checkpoint("qwen3_moe")) for _ in range(2))
    torch.manual_seed(3)
    theirs = get_peft_model(truth, lora(), adapter_name=name)
    torch.manual_seed(3)
    model = expertune.optimize(get_peft_model(ours, lora(), adapter_name=name))
    assert_equal_within(run(model, batch()), run(theirs, batch()), 1e-11)
    assert walks
    assert "routed experts" in str(expertune.trained(model))


def test_a_forward_that_somebody_gave_to_pefts_layer_is_not_passed_over(checkpoint: Checkpoint) -> None:
    truth, ours = (stock(checkpoint("qwen3_moe"), lora()) for _ in range(2))
    wrapper = ours.get_base_model().model.layers[0].mlp.experts
    forward = wrapper.forward
    wrapper.forward = lambda *args: 2 * forward(*args)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts has been given a forward of its own"):
        expertune.optimize(ours)
    del wrapper.forward
    expertune.optimize(ours)
    kept = wrapper.forward
    wrapper.forward = lambda *args: kept(*args)
    expertune.restore(ours)
    assert_equal_within(run(ours, batch()), run(truth, batch()), 1e-12)
