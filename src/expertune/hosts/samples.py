"""What a batch is made of, told to a decoder once a step: where its samples begin, or that padding lies behind them.

With padding or several samples a row, a decoder makes a mask for its layers, where its attention is SDPA of `T x T`:
torch's fastest kernels take none, and a layer that is handed one is not replayed (`hosts/graphs.py`). A step of
training needs neither.
- No token sees the padding behind it, for attention is causal; and what is computed of padding nobody reads, because
  its labels are ignored. So that mask goes, and the batch is as one of whole samples.
- Where positions start again, samples are packed. The rows where they start go down to the attention as tensors, by the
  names that Transformers has for FlashAttention.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.attention.sequences import Sequences
from expertune.hosts import attention

_USUAL = {"full_attention", "sliding_attention"}


def tell(
    hands_down: bool, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook before a decoder's forward, which says what has changed of its arguments.

    Args:
        hands_down: see `hands_down`.
        decoder: the decoder.
        args, kwargs: of the call.
    """
    is_trained = decoder.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    has_cache = kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None
    if not is_trained or has_cache or not attention.is_ours(decoder):
        return None
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        is_behind = isinstance(mask, Tensor) and mask.dim() == 2 and _is_behind(mask.bool())
        return (args, kwargs | {"attention_mask": None}) if is_behind else None
    if not hands_down or position_ids is None or position_ids.dim() != 2:
        return None
    sequences = _told(kwargs, position_ids.device) or Sequences.of_positions(position_ids)
    if sequences is None:
        return None
    sequences = sequences.rounded(position_ids.numel())
    starts = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences.start_C)
    longest = dict.fromkeys(("max_length_q", "max_length_k"), sequences.longest)
    # that there is no padding; without a mask a host looks for packed samples itself, and makes one of T x T
    whole = {"attention_mask": torch.ones_like(position_ids, dtype=torch.bool)}
    return args, kwargs | whole | starts | longest


def hands_down(decoder: nn.Module) -> bool:
    """Whether a decoder's layers attend in the usual ways, and all in between hands on keywords it does not know."""
    if not _USUAL.issuperset(getattr(decoder.config, "layer_types", None) or ()):
        return False  # its masks say more than where samples are
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    attentions = [[each for each in layer.modules() if hasattr(each, "is_causal")] for layer in layers]
    between = [decoder, *layers, *(each for inside in attentions for each in inside)]
    return all(attentions) and all(_takes_any_keyword(type(each).forward) for each in between)


def _told(kwargs: dict[str, Any], device: torch.device) -> Sequences | None:
    """What the collator has told, if it has."""
    start_C, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if start_C is None or longest is None:
        return None
    return Sequences(start_C=start_C.to(device, torch.int32), longest=int(longest))


def _is_behind(is_token_BT: Tensor) -> bool:
    """Whether padding, if there is any, lies behind all tokens of each sample. Waits for the device."""
    return not (is_token_BT[:, 1:] & ~is_token_BT[:, :-1]).any()


def _takes_any_keyword(forward: Callable[..., Any]) -> bool:
    kinds = [each.kind for each in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
