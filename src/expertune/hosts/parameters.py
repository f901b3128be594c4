"""How many parameters a model has, counted without their names.

Transformers' trainer asks for it at every step, to report floating-point operations, while the device waits. The host
builds the names of all parameters for it, which for a model with adapters takes longer than submitting its layers.
"""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_NAME = "num_parameters"


def bind(model: PreTrainedModel) -> None:
    """Let this model count so."""
    if _NAME not in vars(model):
        vars(model)[_NAME] = partial(count, model)


def unbind(model: PreTrainedModel) -> None:
    """Undo `bind`, unless someone has given the model another count since."""
    bound = vars(model).get(_NAME)
    if isinstance(bound, partial) and bound.func is count:
        del vars(model)[_NAME]


def count(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As `PreTrainedModel.num_parameters`, whose arguments these are."""
    if getattr(model, "is_loaded_in_4bit", False):  # the host counts what is packed
        return type(model).num_parameters(model, only_trainable, exclude_embeddings)
    total = 0
    seen: set[Any] = set()
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        if module in seen:
            continue
        seen.add(module)
        modules.extend(child for child in reversed(module._modules.values()) if child is not None)
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in seen:
                continue
            seen.add(parameter)
            is_left = exclude_embeddings and name == "weight" and isinstance(module, nn.Embedding)
            if not is_left and (parameter.requires_grad or not only_trainable):
                total += parameter.numel()
    return total
