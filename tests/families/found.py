"""The families with experts that the installed Transformers holds: found by looking into its files, not by a list."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

_MODELS = Path(transformers.__file__).parent / "models"
_MARK = "\n@use_experts_implementation"
_NAMED = re.compile(r"^class \w*(?:Experts|MoE|MoeBlock)\(", re.MULTILINE)
# served though they stand outside that interface
UNMARKED = ("llama4",)


class Family(NamedTuple):
    """A folder of Transformers, and the model of it that has experts with the least around them.

    Args:
        name: the folder's.
        model_type: of the config.
        auto: builds the model from it.
    """

    name: str
    model_type: str
    auto: Any


@cache
def families() -> dict[str, Family]:
    """Those that an auto class builds, by name."""
    return {name: found for name in with_experts() if (found := _buildable(name)) is not None}


@cache
def with_experts() -> tuple[str, ...]:
    """The folders with experts that are served."""
    marked = {path.parent.name for path in _MODELS.glob("*/modeling_*.py") if _MARK in path.read_text()}
    return tuple(sorted(marked | set(UNMARKED)))


@cache
def outside() -> tuple[str, ...]:
    """The folders with classes that are named like experts, and none that is marked or served."""
    texts = {path.parent.name: path.read_text() for path in _MODELS.glob("*/modeling_*.py")}
    named_so = {name for name, text in texts.items() if _NAMED.search(text)}
    return tuple(sorted(named_so - set(with_experts())))


def family(name: str) -> Family:
    """A causal language model rather than one that also sees, the text model of one that sees rather than the whole."""
    if (found := _buildable(name)) is None:
        raise LookupError(f"no model of Transformers' {name} can be built by an auto class")
    return found


def _buildable(name: str) -> Family | None:
    types = [t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) == name]
    types.sort(key=lambda t: not t.endswith("_text"))
    for auto, mapping in (
        (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (AutoModel, modeling_auto.MODEL_MAPPING_NAMES),
    ):
        for model_type in types:
            if model_type in mapping:
                return Family(name, model_type, auto)
    return None
