"""Tiny models of real families, written to disk and read back by `from_pretrained`, as a user's model is."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "n_group": 2,
    "topk_group": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe_lite": {**MLA, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1},
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
}
# Other ways to name the parts: a gate on the shared expert, Mixtral's w1, w2, w3, PhiMoE's number of experts. For what
# is about names alone.
NAMED: dict[str, dict[str, Any]] = {
    "qwen2_moe": CONFIGS["qwen3_moe"] | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
}
# For what is about its attention alone.
LATENT: dict[str, dict[str, Any]] = {"deepseek_v2": {**MLA, "first_k_dense_replace": 1}}
# Without experts: one that the host runs well, one with sliding windows.
_DENSE = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
DENSE: dict[str, dict[str, Any]] = {
    "qwen3": _DENSE,
    "gemma3_text": _DENSE | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


def save_tiny(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint of random weights."""
    config = AutoConfig.for_model(model_type, **SHARED | (CONFIGS | NAMED | LATENT | DENSE)[model_type] | overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def randomize(model: nn.Module) -> None:
    """Random weights, larger than a family's own, so that every path matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(std=0.2)


def load_tiny(folder: Path, dtype: torch.dtype = torch.float64, experts: str = "eager") -> PreTrainedModel:
    """The host's own model: with `experts="eager"` the truth."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=experts).train()


def tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """A token a word: `<0>` pads, `<1>` begins, `<2>` ends, `<3>` is what is not known."""
    words = {f"<{i}>": i for i in range(num_words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<3>")), pad_token="<0>", bos_token="<1>", eos_token="<2>"
    )


def batch(seed: int = 0, num_rows: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    """Token ids with the last positions of the first row padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHARED["vocab_size"], (num_rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
