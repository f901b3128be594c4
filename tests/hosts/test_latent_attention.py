"""Latent attention found by trying it, and models that run with ours in its place."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch

import expertune
from expertune.attention.attend import attend
from expertune.hosts import attention, forwards, latent_attention
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import of_tokens

# with what they are compared in: DeepSeek-V2 rotates in float32, by complex numbers
FAMILIES = {"glm4_moe_lite": torch.float64, "deepseek_v3": torch.float64, "deepseek_v2": torch.float32}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the batches that were put together by ours."""
    lengths: list[int] = []
    assemble = latent_attention.assemble

    def counted(q_BTHD: torch.Tensor, *args: Any) -> Any:
        lengths.append(q_BTHD.shape[1])
        return assemble(q_BTHD, *args)

    monkeypatch.setattr(latent_attention, "assemble", counted)
    return lengths


@pytest.mark.parametrize("attention", ["auto", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_as_the_hosts(checkpoint: Checkpoint, family: str, attention: Any, calls: list[int]) -> None:
    stock = load_tiny(checkpoint(family), FAMILIES[family])
    ours = expertune.optimize(copy.deepcopy(stock), attention=attention)
    results = []
    for model in (ours, stock):
        calls.clear()
        out = model(**batch(), use_cache=False)
        out.loss.backward()
        results.append([of_tokens(out.logits.detach(), batch()), *[p.grad for p in model.parameters()]])
        assert calls == ([11, 11] if model is ours else [])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "settings", [{"rope_interleave": False}, {"q_lora_rank": None}, {"attention_bias": True}], ids=str
)
def test_settings_of_the_family_are_kept(checkpoint: Checkpoint, settings: dict[str, Any], calls: list[int]) -> None:
    stock = load_tiny(checkpoint("glm4_moe_lite", **settings), torch.float64)
    ours = expertune.optimize(copy.deepcopy(stock))
    calls.clear()
    outs = [of_tokens(model(**batch(), use_cache=False).logits, batch()) for model in (ours, stock)]
    assert calls == [11, 11]
    torch.testing.assert_close(*outs)


def test_with_a_cache_the_hosts_own_runs(checkpoint: Checkpoint, calls: list[int]) -> None:
    stock = load_tiny(checkpoint("glm4_moe_lite"), torch.float64).eval()
    ours = expertune.optimize(copy.deepcopy(stock))
    calls.clear()
    ids = batch()["input_ids"][1:]
    texts = [model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False) for model in (ours, stock)]
    assert calls == []
    assert torch.equal(*texts)


def test_it_is_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("deepseek_v3"), torch.float32), graphs=False)
    attentions = [m for m in model.modules() if type(m).__name__ == "DeepseekV3Attention"]
    assert all(forwards.runs(attention, latent_attention.forward) for attention in attentions)
    expertune.restore(model)
    assert all(forwards.given(attention) is None for attention in attentions)


def test_a_class_that_computes_otherwise_is_left_alone(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("glm4_moe_lite"), torch.float32)
    module = import_module("transformers.models.glm4_moe_lite.modeling_glm4_moe_lite")
    assert latent_attention.find(model)

    class Scaled(module.Glm4MoeLiteAttention):  # type: ignore[misc,name-defined]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(1.01 * hidden_states, **kwargs)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    assert latent_attention.find(model) == []


def test_attention_of_another_kind_is_left_alone(checkpoint: Checkpoint) -> None:
    assert latent_attention.find(load_tiny(checkpoint("qwen3_moe"), torch.float32)) == []


@pytest.mark.parametrize(("family", "overwrites"), [("glm4_moe_lite", True), ("qwen3_moe", False)])
def test_what_it_puts_together_may_be_written_over(
    checkpoint: Checkpoint, family: str, overwrites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else has it; other attentions get what projections gave, which hooks may have kept."""
    told: list[bool] = []

    def noted(*args: Any, **settings: Any) -> torch.Tensor:
        told.append(settings["overwrites"])
        return attend(*args, **settings)

    monkeypatch.setattr(attention, "attend", noted)
    monkeypatch.setattr(attention, "goes_beyond_sdpa", lambda *_: True)
    ours = expertune.optimize(load_tiny(checkpoint(family), torch.float64))
    ours(input_ids=torch.randint(3, 60, (2, 9)), use_cache=False)
    assert told == [overwrites] * 2
