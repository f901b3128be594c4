"""The width of a layer: what its products and norms yield a token, twice, with adapters or without."""

from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedConfig

from expertune.hosts.widths import width_of
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, wrap
from tests.hosts.models import load_tiny

ATTENTION = 4 * 8 + 2 * 2 * 8 + 32  # queries, keys and values, output
NORMS = 2 * 32


def _router(model: Any) -> int:
    """Whether the host's router is a linear depends on its version."""
    return sum(m.out_features for m in model.model.layers[0].mlp.gate.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("settings", [None, lora(), lora(target_modules=["q_proj", "v_proj", "o_proj"], r=16)])
def test_products_and_norms_count_twice(checkpoint: Checkpoint, settings: Any) -> None:
    model: Any = load_tiny(checkpoint("qwen3_moe"))
    layer, router = model.model.layers[0], _router(model)
    if settings is not None:
        wrap(model, settings)
    experts = 2 * (2 * 24 + 32)  # two a token: gate and up, then down
    assert width_of(layer, model.config) == 2 * (ATTENTION + NORMS + 2 * 8 + router + experts)  # 2 * 8: norms of heads


def test_where_the_config_says_no_number_all_experts_count(checkpoint: Checkpoint) -> None:
    model: Any = load_tiny(checkpoint("qwen3_moe"))
    layer = model.model.layers[0]
    assert width_of(layer, PreTrainedConfig()) - width_of(layer, model.config) == 2 * (8 - 2) * (2 * 24 + 32)


def test_dense_layers_and_shared_experts_count_as_products(checkpoint: Checkpoint) -> None:
    model: Any = load_tiny(checkpoint("deepseek_v3"))
    dense, sparse = (width_of(layer, model.config) for layer in model.model.layers)
    gate = model.model.layers[1].mlp.gate
    router = sum(m.out_features for m in gate.modules() if isinstance(m, nn.Linear))
    shared, experts, mlp = 2 * 24 + 32, 2 * (2 * 24 + 32), 2 * 48 + 32
    assert sparse - dense == 2 * (shared + experts + router - mlp)
