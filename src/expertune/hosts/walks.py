"""The walks over all modules of a model that a trainer makes at every step, while the device waits.

Transformers' trainer counts the parameters, to report floating-point operations, for which the host builds the names of
all; and it sets every module to training, with a call for each. A layer with adapters holds some seventy modules, so
both take longer than submitting it. Here each is one loop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def bind(model: PreTrainedModel) -> None:
    """Let this model walk so."""
    for name, walk in _WALKS.items():
        if name not in vars(model):
            vars(model)[name] = partial(walk, model)


def unbind(model: PreTrainedModel) -> None:
    """Undo `bind`, unless someone has given the model other methods since."""
    for name, walk in _WALKS.items():
        bound = vars(model).get(name)
        if isinstance(bound, partial) and bound.func is walk:
            del vars(model)[name]


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


def train(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """As `PreTrainedModel.train`, whose argument this is."""
    if not isinstance(mode, bool) or not _is_plain(model):
        trained: PreTrainedModel = type(model).train(model, mode)
        return trained
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        if module is not model and ("train" in vars(module) or not _is_plain(module)):
            module.train(mode)
            continue
        if module.training is not mode:
            module.training = mode
        modules.extend(child for child in module._modules.values() if child is not None)
    return model


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's class does no more on `train` than to hand it on to what it holds."""
    kind = type(module).train
    return kind is nn.Module.train or (kind is PreTrainedModel.train and not getattr(module, "use_kernels", False))


_WALKS: dict[str, Callable[..., Any]] = {"num_parameters": count, "train": train}
