"""Transformers' continuous batching (`generate_batch`, also within TRL's GRPO), which knows attentions by their names.

It refuses ours, and puts a paged one in the place of the host's. So the host's comes back when it begins, and ours when
the model is next called after it has ended, or in training mode while it waits.
"""

import weakref
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from expertune.hosts import attention
from expertune.hosts.attached import Attached

_ENTRY = "init_continuous_batching"  # that all others go through

_managers: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()  # the last of a model


def bind(model: PreTrainedModel, state: Attached) -> None:
    """Give the host's attention back when continuous batching begins."""
    if hasattr(model, _ENTRY) and _ENTRY not in vars(model):
        vars(model)[_ENTRY] = partial(_begin, model, state)


def unbind(model: nn.Module) -> None:
    """Undo `bind`, unless someone has given the model another method since."""
    bound = vars(model).get(_ENTRY)
    if isinstance(bound, partial) and bound.func is _begin:
        del vars(model)[_ENTRY]


def has_ended(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether what began last is over, or waits while the model is trained."""
    manager = _managers[model]() if model in _managers else None
    return manager is None or (decoder.training and not manager.is_running())


def _begin(model: Any, state: Attached, *args: Any, **kwargs: Any) -> Any:
    attention.give_back(state.attentions)
    state.is_attention_lent = True
    _managers.pop(model, None)
    manager = getattr(type(model), _ENTRY)(model, *args, **kwargs)
    _managers[model] = weakref.ref(manager)
    return manager
