"""Transformers' classes and configs, where families differ in what they call the same thing."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

_BROKEN = ("llama4",)  # its forward fails in 5.24, on text alone as well
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that builds the language model of a config: of one that also sees or hears, the whole of it.

    Of some configs there are both, the whole and the language model alone: what was saved is what its config names.
    """
    kind = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING or is_cut(config):
        return AutoModelForCausalLM
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    names_part = MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__ in (config.architectures or ())
    return AutoModelForCausalLM if names_part else AutoModelForMultimodalLM


def is_cut(config: PreTrainedConfig) -> bool:
    """Whether of a model that also sees the language model alone is built: the whole does not run in Transformers."""
    return config.model_type in _BROKEN


def top_k_of(config: PreTrainedConfig) -> int | None:
    """How many experts a token takes; None where the config does not say, or not one number for all layers."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _TOP_K)
    return next((top_k for top_k in named if isinstance(top_k, int)), None)
