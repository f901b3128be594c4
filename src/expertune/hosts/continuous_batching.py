"""Transformers' continuous batching (`generate_batch`, also within TRL's GRPO), which knows attentions by their names.

It refuses ours, and puts a paged one in the place of the host's. So the host's comes back when it begins, and ours when
the model is next called in training mode.
"""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from expertune.hosts import attention
from expertune.hosts.attached import Attached

_ENTRY = "init_continuous_batching"  # that all others go through


def bind(model: PreTrainedModel, state: Attached) -> None:
    """Give the host's attention back when continuous batching begins."""
    if hasattr(model, _ENTRY) and _ENTRY not in vars(model):
        vars(model)[_ENTRY] = partial(_begin, model, state)


def unbind(model: nn.Module) -> None:
    """Undo `bind`, unless someone has given the model another method since."""
    bound = vars(model).get(_ENTRY)
    if isinstance(bound, partial) and bound.func is _begin:
        del vars(model)[_ENTRY]


def _begin(model: Any, state: Attached, *args: Any, **kwargs: Any) -> Any:
    attention.give_back(state.attentions)
    state.is_attention_lent = True
    return getattr(type(model), _ENTRY)(model, *args, **kwargs)
