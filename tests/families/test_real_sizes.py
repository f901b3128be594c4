"""Models of their real sizes, by shape alone: nothing is allocated, and what would be trained is counted."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import expertune
from expertune.hosts.transformers import layout_of, named_experts

RANK = 16
# hidden size, width of an expert, experts, layers with experts; as published for the model that a config describes
REAL: dict[str, tuple[int, int, int, int]] = {
    "deepseek_v3": (7168, 2048, 256, 58),
    "llama4_text": (5120, 8192, 16, 48),
    "gpt_oss": (2880, 2880, 128, 36),
    "mixtral": (4096, 14336, 8, 32),
    "qwen3_moe": (2048, 768, 128, 24),
    "qwen3_next": (2048, 512, 512, 48),
    "glm4_moe": (4096, 1408, 128, 45),
    "minimax_m2": (3072, 1536, 256, 62),
}


@pytest.mark.parametrize("model_type", REAL)
def test_a_model_of_its_real_size(model_type: str) -> None:
    width, expert_width, num_experts, num_layers = REAL[model_type]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type), dtype=torch.bfloat16)
    expertune.optimize(model)
    layouts = [layout_of(module) for _, module in named_experts(model)]
    assert {(x.model_width, x.expert_width, x.num_experts) for x in layouts} == {(width, expert_width, num_experts)}
    assert len(layouts) == num_layers
    assert len(expertune.explain(model).layers) == num_layers
    with torch.device("meta"):
        adapted = expertune.add_lora(model, r=RANK, target_modules=["gate_proj", "up_proj", "down_proj"])
    a_layer = num_experts * RANK * ((width + 2 * expert_width) + (expert_width + width))
    assert expertune.trained(adapted).kinds()["routed experts"] == num_layers * a_layer
    assert all(p.is_meta for p in adapted.parameters())
