"""A tiny model of any family: its own config with every size that is known by name made small."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from tests.families.found import Family
from tests.hosts.models import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 60,
    "video_token_id": 61,
    "audio_token_id": 62,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "out_hidden_size": 32,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    # multi-head latent attention and its index
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "o_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "n_groups": 2,
    # Gemma
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    # nothing by chance
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}
# Sizes that a family's config leaves open; the others are left open too, because None often means "without".
_ASKED = {
    "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "head_dim", "num_experts", "top_k_experts",
    "moe_intermediate_size",
}  # fmt: skip
# What the sizes of one family need beside.
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_HYBRID = ["linear_attention", "full_attention"] * 2
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _SPARSE}},
    # refused, but not before they are built
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"rope_theta": 1e4}},
    "doge": {"is_moe": True},
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "sliding_window_size": 8,
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [24, 24], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}
    },
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"text_config": {"rope_parameters": _ROPE}},
    "glm5_next": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {"layer_types": _HYBRID},
    "hy_v4_vl": {"text_config": {"rope_parameters": _ROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    # no_rope_layers, layer_types and moe_layers follow from the number of layers
    "llama4": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 56, "attention_chunk_size": 4},
    "mistral4": {"head_dim": 16},
    "muse_spark": {
        "audio_config": {"hidden_sizes": (8, 8, 16, 32), "depths": (1, 1, 1, 1)},
        "text_config": {"moe_hidden_size": 40},
    },
    "qwen3_omni_moe": {
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "downsample_hidden_size": 32,
            "output_dim": 32,
        },
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(family: Family) -> PretrainedConfig:
    """The family's config, small."""
    return _small(CONFIG_MAPPING[family.model_type], OVERRIDES.get(family.name, {}))


def _small(cls: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    default = cls()
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            # as a dictionary: configs of older hosts take nothing else
            settings[name] = _small(type(value), overrides.get(name, {})).to_dict()
        elif name in SIZES and (value is not None or name in _ASKED):
            settings[name] = SIZES[name]
    if vars(default).get("kv_lora_rank"):
        settings["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention has no groups
    settings |= {
        name: value for name, value in overrides.items() if not isinstance(vars(default).get(name), PretrainedConfig)
    }
    return cls(**settings)


def tiny_model(family: Family) -> PreTrainedModel:
    """A model with random weights in float64: the host's eager code."""
    torch.manual_seed(0)
    model: PreTrainedModel = family.auto.from_config(
        tiny_config(family), dtype=torch.float64, experts_implementation="eager"
    )
    model.double()  # all of it: some hosts keep a part in float32
    randomize(model)
    for name, buffer in model.named_buffers():
        if "tid2eid" in name:  # a table of experts by token, which is all zeros until it is loaded
            buffer.copy_(torch.rand(buffer.shape[0], SIZES["num_experts"]).topk(buffer.shape[1]).indices)
    return model.train()
