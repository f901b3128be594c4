"""What a batch is made of, told to a decoder once a step: where its samples begin, or that padding lies behind them.

With padding or several samples a row, a decoder makes a mask for its layers, where its attention is SDPA of `T x T`:
torch's fastest kernels take none, and a layer that is handed one is not replayed (`hosts/graphs.py`). A step of
training needs neither.
- No token sees the padding behind it, for attention is causal; and what is computed of padding nobody reads, because
  its labels are ignored. So that mask goes, and the batch is as one of whole samples; the decoder is given one that is
  known to hide nothing, for without any it waits for the device to tell whether samples are packed.
- Where positions start again, samples are packed, unless there is a mask beside them, as Transformers has it. The rows
  where they start go down to the attention as tensors, by the names that Transformers has for FlashAttention.
"""

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.attention.sequences import Sequences
from expertune.hosts import attention

_USUAL = {"full_attention", "sliding_attention"}


class Teller:
    """A hook before a decoder's forward, which says what has changed of its arguments.

    Args:
        decoder: the decoder.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self._attentions = attention.attentions_of(decoder)
        self._hands_down = hands_down(decoder)

    def __call__(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Called by torch."""
        if torch.compiler.is_compiling():
            return None
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if position_ids is not None:
            attention.note_positions(position_ids, are_beside_a_mask=mask is not None)
        is_trained = decoder.training and torch.is_grad_enabled()
        has_cache = kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None
        if not is_trained or has_cache or not attention.is_ours(decoder) or not self._is_causal(kwargs):
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and _is_behind(mask)):
            return None
        x = input_of(args, kwargs)
        if not self._hands_down or x is None or (position_ids is not None and position_ids.dim() != 2):
            is_read = mask is not None and position_ids is not None  # without a mask the host looks at positions
            return None if is_read else (args, kwargs | {"attention_mask": None})
        told = {"attention_mask": attention.hiding_nothing(x.shape[:2], x.device)}
        if mask is None and position_ids is not None:
            told |= _packed(position_ids.expand(len(x), -1), kwargs)
        return args, kwargs | told

    def _is_causal(self, kwargs: dict[str, Any]) -> bool:
        """Whether attention is, now: some turn that off after a model was loaded, or for one call."""
        return kwargs.get("is_causal") is not False and all(module.is_causal for module in self._attentions)


def _packed(position_BT: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords that tell where samples start, if they are packed; a collator may have told it."""
    sequences = attention.told(None, kwargs) or Sequences.of_positions(position_BT)
    if sequences is None:
        return {}
    sequences = sequences.rounded(position_BT.numel())
    starts = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences.start_C)
    return starts | dict.fromkeys(("max_length_q", "max_length_k"), sequences.longest)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a decoder is called with, `(B, T, …)`."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return next((x for x in given if isinstance(x, Tensor) and x.dim() >= 2), None)


def hands_down(decoder: nn.Module) -> bool:
    """Whether a decoder's layers attend in the usual ways, and all in between hands on keywords it does not know."""
    if not _USUAL.issuperset(getattr(decoder.config, "layer_types", None) or ()):
        return False  # its masks say more than where samples are
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    attentions = [attention.attentions_of(layer) for layer in layers]
    between = [decoder, *layers, *chain.from_iterable(attentions)]
    return all(attentions) and all(_takes_any_keyword(type(each).forward) for each in between)


def _is_behind(mask_BT: Tensor) -> bool:
    """Whether padding, 0 in the mask, lies behind all tokens of each sample, if there is any. Waits for the device."""
    return not (mask_BT[:, 1:] > mask_BT[:, :-1]).any()


def _takes_any_keyword(forward: Callable[..., Any]) -> bool:
    kinds = [each.kind for each in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
