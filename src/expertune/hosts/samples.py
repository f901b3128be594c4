"""What a batch is made of, told to a decoder once a step: where its samples begin, or that padding lies behind them.

With padding or several samples a row, a decoder makes a mask for its layers, where its attention is SDPA of `T x T`:
torch's fastest kernels take none, and a layer that is handed one is not replayed (`hosts/graphs.py`). Neither is needed
for samples, nor in a step of training for padding.
- No token sees the padding behind it, for attention is causal; and what is computed of padding nobody reads, where its
  labels are ignored. So that mask goes, and the batch is as one of whole samples; the decoder is given one that is
  known to hide nothing, for without any it waits for the device to tell whether samples are packed. Where padding has
  labels, or the model was given none, a mask of SDPA's stays. Attention of ours (`attention.IMPLEMENTATION`) gives
  nothing of the host's for padding either way, which is said where it has labels.
- Where positions start again, at zero, samples are packed, unless there is a mask beside them, as Transformers has it.
  The rows where they start go down to the attention as tensors, by the names that Transformers has for FlashAttention.
  What positions that skip mean is the host's to say: most let a sample begin there, some read no positions.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from expertune.attention.sequences import Sequences, skip
from expertune.hosts import attention
from expertune.hosts.label_rows import IGNORED

_LEARNED = (
    "Padding has labels, and this model's attention gives nothing for padding: the loss counts what means nothing. Set "
    f"the labels of padding, where attention_mask is 0, to {IGNORED}."
)
_NO_WEIGHTS = (
    "Attention is computed without a matrix of its weights, so output_attentions gives none. For these call "
    "expertune.optimize(model, attention='host') and load the model with attn_implementation='eager'."
)
_USUAL = {"full_attention", "sliding_attention"}


class Labels:
    """Those of the call that a model is in, by two hooks around its forward; None where it was given none by name."""

    def __init__(self) -> None:
        self.given_BT: Tensor | None = None

    def take(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before."""
        self.given_BT = kwargs.get("labels")

    def drop(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Behind."""
        self.given_BT = None


def hook(model: nn.Module, decoders: Iterable[PreTrainedModel]) -> list[RemovableHandle]:
    """Tell the decoders of a model, in every call."""
    labels = Labels()
    before = model.register_forward_pre_hook(labels.take, with_kwargs=True)
    behind = model.register_forward_hook(labels.drop, always_call=True)
    tellers = [each.register_forward_pre_hook(Teller(each, labels), with_kwargs=True) for each in decoders]
    return [before, behind, *tellers]


class Teller:
    """A hook before a decoder's forward, which says what has changed of its arguments.

    Args:
        decoder: the decoder.
        labels: of the model around it.
    """

    def __init__(self, decoder: PreTrainedModel, labels: Labels) -> None:
        self._labels = labels
        self._attentions = attention.attentions_of(decoder)
        self._hands_down = hands_down(decoder)
        self._names = list(inspect.signature(type(decoder).forward).parameters)[1:]  # without self

    def __call__(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Called by torch."""
        if torch.compiler.is_compiling() or not attention.is_ours(decoder):
            return None
        named = dict(zip(self._names[1:], args[1:], strict=False)) | kwargs  # all but the first may be given by place
        if _is_on("output_attentions", decoder, named):
            warnings.warn(_NO_WEIGHTS, stacklevel=2)
        return args[:1], named | self._told(decoder, args[:1], named)

    def _told(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that are others than they were given."""
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        is_trained = decoder.training and torch.is_grad_enabled()
        makes_cache = not is_trained and _is_on("use_cache", decoder, kwargs)
        start_none = mask is not None or has_cache(kwargs) or makes_cache  # whatever positions there are
        told: dict[str, Any] = {}
        if position_ids is not None and start_none:
            told["position_ids"] = attention.starting_no_samples(position_ids)
        if has_cache(kwargs) or not self._is_causal(kwargs):
            return told
        if mask is not None and not (is_trained and self._may_go(decoder, mask, kwargs)):
            return told
        x = input_of(args, kwargs)
        if not self._hands_down or x is None or (position_ids is not None and position_ids.dim() != 2):
            stays = mask is not None and position_ids is not None  # without one the host would look at positions
            return told if stays or not is_trained else told | {"attention_mask": None}
        starts: dict[str, Any] | None = {}
        if position_ids is not None and not start_none:
            starts = _starts(position_ids.expand(len(x), -1), kwargs)
        if starts is None or not (starts or is_trained):
            return told
        return told | starts | {"attention_mask": attention.hiding_nothing(x.shape[:2], x.device)}

    def _may_go(self, decoder: PreTrainedModel, mask: Any, kwargs: dict[str, Any]) -> bool:
        """Whether nobody would miss a mask. Waits for the device."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return False
        hidden_BT, label_BT = mask == 0, self._labels_beside(mask, kwargs)
        if not hidden_BT.any():
            return True
        if (hidden_BT[:, :-1] > hidden_BT[:, 1:]).any():
            return False
        is_read = label_BT is None or bool((hidden_BT & (label_BT != IGNORED)).any())
        gives_nothing = attention.gives_nothing_of_padding(decoder)
        if is_read and label_BT is not None and gives_nothing:
            warnings.warn(_LEARNED, stacklevel=2)
        return gives_nothing or not is_read

    def _labels_beside(self, mask: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Those of a mask's tokens, if only what has one is read; hooks of `device_map` may have moved the mask."""
        label_BT = self._labels.given_BT
        if label_BT is None or label_BT.shape != mask.shape or kwargs.get("output_hidden_states"):
            return None
        return label_BT.to(mask.device)

    def _is_causal(self, kwargs: dict[str, Any]) -> bool:
        """Whether attention is, now: some turn that off after a model was loaded, or for one call."""
        return kwargs.get("is_causal") is not False and all(module.is_causal for module in self._attentions)


def _starts(position_BT: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The keywords that tell where samples start, if they are packed; a collator may have told it.

    None where positions skip, too.
    """
    sequences = attention.told(None, kwargs)
    if sequences is None:
        if skip(position_BT):
            return None
        sequences = Sequences.of_positions(position_BT)
    if sequences is None:
        return {}
    sequences = sequences.rounded(position_BT.numel())
    starts = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences.start_C)
    return starts | dict.fromkeys(("max_length_q", "max_length_k"), sequences.longest)


def _is_on(name: str, decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call has a setting on, by itself or by the decoder's config."""
    said = kwargs.get(name)
    return bool(getattr(decoder.config, name, False) if said is None else said)


def has_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a decoder is called with keys and values of earlier tokens, or room for them."""
    return kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None


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


def _takes_any_keyword(forward: Callable[..., Any]) -> bool:
    kinds = [each.kind for each in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
