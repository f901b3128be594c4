"""The shapes that are measured: models of the real widths, with random weights, and what LoRA is put on."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_AT_ONCE = 4  # parts of a model that are written side by side
_QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 262144,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_GPT_OSS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
_GLM = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "max_position_embeddings": 202752,
}
_MOONLIGHT = {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
    "max_position_embeddings": 8192,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
}
# name: the model type of Transformers, and its widths
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("qwen3_moe", _QWEN3 | _TINY),
    "qwen3": ("qwen3_moe", _QWEN3),  # Qwen3-30B-A3B
    "gptoss": ("gpt_oss", _GPT_OSS),  # gpt-oss-20b
    "glm": ("glm4_moe_lite", _GLM),  # GLM-4.7-Flash
    "moonlight": ("deepseek_v3", _MOONLIGHT),  # Moonlight-16B-A3B: DeepSeek-V3's layers at a size for one card
    "gemma3": ("gemma3_text", _GEMMA3),  # Gemma-3-12B, dense: what its attention alone is worth
}
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_KV_AND_OUT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_OTHER_TARGETS = {"glm": ("q_a_proj", "q_b_proj", *_KV_AND_OUT), "moonlight": ("q_proj", *_KV_AND_OUT)}
_SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False}


def attention_targets(shape: str) -> list[str]:
    """The attention's linears that take LoRA."""
    return list(_OTHER_TARGETS.get(shape, _QKVO))


def expert_targets(shape: str) -> list[str]:
    """The experts' projections that take LoRA; none of a dense model."""
    return [] if shape == "gemma3" else ["gate_up_proj", "down_proj"]


def longest_context(shape: str) -> int:
    """Tokens that the model's positions reach."""
    return int(SHAPES[shape][1]["max_position_embeddings"])


def model_config(shape: str, layers: int, **overrides: Any) -> Any:
    """Transformers' config of the shape with this many layers."""
    from transformers import AutoConfig  # here, not above: a peer may want to be imported before it

    model_type, widths = SHAPES[shape]
    return AutoConfig.for_model(model_type, **widths | _SPECIAL | overrides, num_hidden_layers=layers)


def frozen_model(shape: str, device: Any) -> Any:
    """Two layers of the shape with random weights in bfloat16, frozen, and a small head, which is not measured."""
    import torch
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(model_config(shape, layers=2, vocab_size=256), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def write_model(shape: str, layers: int, folder: Path, seed: int = 0, **overrides: Any) -> None:
    """A checkpoint of the shape with random weights in bfloat16, as `from_config` draws them.

    Layers are drawn, converted and written a few at a time, so it may be larger than a card could convert at once.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of each part
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers, **overrides), dtype=torch.bfloat16)
    others = [(name, m) for name, m in model.named_modules() if not name.startswith("model.layers") and not _inner(m)]
    parts = [others, *([(f"model.layers.{i}", layer)] for i, layer in enumerate(model.model.layers))]

    def draw(part: list[tuple[str, Any]]) -> dict[str, Any]:
        for _, module in part:
            module.to_empty(device=device).apply(model._init_weights)
        return {f"{name}.{key}": x for name, module in part for key, x in module.state_dict().items()}

    def save(number: int, tensors: dict[str, Any]) -> dict[str, str]:
        model.save_pretrained(folder / str(number), state_dict=tensors, max_shard_size="100GB")
        return _take_in(folder, str(number))

    files: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool, torch.no_grad():
        for first in range(0, len(parts), _AT_ONCE):
            some = parts[first : first + _AT_ONCE]
            for held in pool.map(save, range(first, first + len(some)), list(map(draw, some))):
                files |= held
            for _, module in itertools.chain.from_iterable(some):
                module.to_empty(device="meta")
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _inner(module: Any) -> bool:
    """Whether a module holds others."""
    return any(True for _ in module.children())


def _take_in(folder: Path, number: str) -> dict[str, str]:
    """Move what was saved in a folder of this number to the one around it, and say which file holds which tensor."""
    from safetensors import safe_open

    name = f"model-{number}.safetensors"
    (folder / number / "model.safetensors").rename(folder / name)
    for path in (folder / number).iterdir():  # the configs, the same each time
        path.replace(folder / path.name)
    (folder / number).rmdir()
    with safe_open(folder / name, "pt") as file:
        return dict.fromkeys(file.keys(), name)
