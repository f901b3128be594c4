"""The experts of a model that is not loaded: built from its config on the meta device, so weights are neither read nor
made, and the flags of its own classes say how they lie."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig

from expertune.hosts.classes import auto_class, top_k_of
from expertune.hosts.transformers import layout_of, named_experts
from expertune.shapes import ExpertsLayout


@dataclass(frozen=True, kw_only=True)
class ExpertsOutline:
    """The experts of a model.

    Args:
        layouts: each that occurs in its layers, once.
        top_k: experts per token.
    """

    layouts: tuple[ExpertsLayout, ...]
    top_k: int


def outline(name_or_path: str) -> ExpertsOutline:
    """The experts of a model, from its config.

    Args:
        name_or_path: a hub id or folder, as `from_pretrained` takes it.

    Raises:
        ValueError: it has no experts that the walk knows, or its config does not say how many a token takes.
        OSError: there is no such model.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    layouts = tuple(dict.fromkeys(layout_of(module) for _, module in named_experts(model)))
    if not layouts:
        raise ValueError(f"{name_or_path} ({config.model_type}) has no experts.")
    if (top_k := top_k_of(config)) is None:
        raise ValueError(
            f"the config of {name_or_path} ({config.model_type}) does not say how many experts a token takes."
        )
    return ExpertsOutline(layouts=layouts, top_k=top_k)
