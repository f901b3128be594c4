"""Transformers' attention interface: our attention where the host would run with a full matrix of scores.

A model that declares support for FlashAttention keeps its contract: attention is causal, with sliding windows and sinks
as keywords, and a 2D mask says what is padding. Such a model is taken over: as a whole where the host has nothing in
linear memory for it, because it does not support torch's SDPA (sinks) or has sliding windows, for which SDPA wants a
mask of `T x T`; elsewhere for packed samples, and for whole ones where a kernel of ours is faster; SDPA does the rest.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from expertune.attention.attend import PREFERRED, attend, goes_beyond_sdpa
from expertune.attention.kernels import Pattern, choose
from expertune.attention.sequences import Sequences
from expertune.hosts import windows

IMPLEMENTATION = "expertune"
BESIDE_SDPA = "expertune_beside_sdpa"
ALL = (IMPLEMENTATION, BESIDE_SDPA)
_HOSTS_OWN = ("eager", "sdpa")
_SEQUENCES = WeakTensorKeyDictionary()  # found once a step, by the mask or the positions that every layer gets
_START_NO_SAMPLES = WeakTensorKeyDictionary()  # positions
_HIDING_NOTHING = WeakTensorKeyDictionary()  # masks; nobody can write into one, for it is a single number


def register() -> None:
    """Enter our attention into the host's registries. Twice does no harm."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    AttentionInterface.register(BESIDE_SDPA, _attention_beside_sdpa)
    AttentionMaskInterface.register(BESIDE_SDPA, _mask_beside_sdpa)


def why_not(decoder: PreTrainedModel, model: nn.Module) -> str | None:
    """Why a decoder keeps the host's attention, in words; None if ours takes over, or may stay.

    Args:
        decoder: the decoder.
        model: that it is a part of.
    """
    config = decoder.config
    implementation = config._attn_implementation
    if implementation not in (*_HOSTS_OWN, *ALL):
        return f"{implementation} was asked for"
    if not decoder._supports_flash_attn:
        return f"{type(decoder).__name__} does not keep the contract of FlashAttention"
    attentions = attentions_of(decoder)
    if not attentions:
        return "no attention of its says that it is causal"
    if not all(each.is_causal for each in attentions):
        return "it attends in both directions"
    if not all(each.is_causal for each in attentions_of(model) if getattr(each, "config", None) is config):
        return "one in both directions has the same config, by which both are chosen"
    if others := {each._attn_implementation for each in _configs_of(decoder)} - {implementation}:
        return f"a config of one of its layers asks for {', '.join(sorted(others))}"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "it attends in chunks"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its scores are capped"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention weights at random"
    windowed = [each for each in attentions if hasattr(each, "sliding_window")]
    if any(windows.held(each) != windows.said_of(each, config) for each in windowed):
        return "its layers were made with other windows than its config says"
    return None


def attentions_of(module: nn.Module) -> list[Any]:
    """Those inside a module, known by that they say whether they are causal."""
    return [each for each in module.modules() if hasattr(each, "is_causal")]


def widths_of(attention: Any) -> tuple[int, int] | None:
    """Of its heads, and of their values; None where it does not say. (A config whose layers differ refuses to.)"""
    width = getattr(attention, "qk_head_dim", getattr(attention, "head_dim", None))
    return (width, getattr(attention, "v_head_dim", width)) if isinstance(width, int) else None


def has_sinks(attention: Any) -> bool:
    """Whether its queries have one more score each, as gpt-oss'."""
    return getattr(attention, "sinks", None) is not None


def take_over(decoder: PreTrainedModel) -> list[tuple[Any, str]]:
    """Let a decoder attend through ours; its configs come back, each with what it named, for `give_back`."""
    register()
    ours = IMPLEMENTATION if forms_scores(decoder) else BESIDE_SDPA
    had = [(config, config._attn_implementation) for config in _configs_of(decoder)]
    for config, _ in had:
        config._attn_implementation = ours
    return had


def _configs_of(decoder: PreTrainedModel) -> list[Any]:
    """By which a decoder makes masks and its attentions choose their function: one, but where layers were copied.

    PEFT copies those of `modules_to_save`, for instance.
    """
    configs = [getattr(each, "config", None) for each in (decoder, *attentions_of(decoder))]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


def forms_scores(decoder: PreTrainedModel) -> bool:
    """Whether the host's own attention forms all scores of whole samples."""
    return not decoder._supports_sdpa or _has_windows(decoder.config)


def give_back(configs: list[tuple[Any, str]]) -> None:
    """Undo `take_over`, but where someone has chosen another attention since."""
    for config, had in configs:
        if config._attn_implementation in ALL:
            config._attn_implementation = had


def is_ours(decoder: PreTrainedModel) -> bool:
    """Whether a decoder attends through ours."""
    return decoder.config._attn_implementation in ALL


def gives_nothing_of_padding(decoder: PreTrainedModel) -> bool:
    """Whether what attention gives for padding is not what the host's would."""
    return decoder.config._attn_implementation == IMPLEMENTATION


def kernels_of(decoder: PreTrainedModel) -> str:
    """Which kernels its layers take in the dtype and on the device of its weights, for what ours attends to."""
    weight = next(decoder.parameters())
    widths = {widths for each in attentions_of(decoder) if (widths := widths_of(each)) is not None}
    if forms_scores(decoder):
        kinds = {"full": Pattern(scale=1.0, has_sinks=any(map(has_sinks, attentions_of(decoder))))}
        kinds |= {"windows": Pattern(scale=1.0, window=1)} if _has_windows(decoder.config) else {}
    else:
        starts = torch.empty(1, dtype=torch.int32, device=weight.device)
        kinds = {"packed samples": Pattern(scale=1.0, sequences=Sequences(start_C=starts, longest=0))}
        kinds |= {"whole samples": Pattern(scale=1.0)}
    words = []
    for (kind, pattern), (width, of_values) in product(kinds.items(), sorted(widths)):
        row = torch.empty(1, 1, 1, width, dtype=weight.dtype, device=weight.device)
        q_BHTD = row.expand(-1, -1, 2**16, -1)
        v_BJSV = row[..., :of_values].expand(-1, -1, 2**16, -1)
        if kind == "whole samples" and not goes_beyond_sdpa(q_BHTD, v_BJSV):
            continue
        kernel, passed_over = choose(PREFERRED, q_BHTD, v_BJSV, pattern)
        reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
        heads = f"heads of {width}" + (f" over values of {of_values}" if of_values != width else "")
        words.append(f"{kind}, {heads}: {kernel.name}{reasons}")
    return " · ".join(words)


def waits(implementation: str, keywords: dict[str, Any]) -> bool:
    """Whether a layer that attends so waits for the device to tell which rows belong together.

    Args:
        implementation: the name of its attention.
        keywords: of the layer's call.
    """
    mask = keywords.get("attention_mask")
    if implementation != IMPLEMENTATION or told(mask, keywords) is not None:
        return False
    return mask is not None or _sequences(None, keywords.get("position_ids")) is not None


def starting_no_samples(position_ids: Tensor) -> Tensor:
    """The same positions, known to start no samples: beside a mask, which says all that is hidden, or with a cache.

    Of a decoder's call alone, so another with the caller's own tensor is read as it is. A mask that hides nothing does
    not come down to the layers, the positions do.
    """
    alias = position_ids.view_as(position_ids)
    _START_NO_SAMPLES[alias] = True
    return alias


def told(mask: Any, keywords: dict[str, Any]) -> Sequences | None:
    """The packed samples of a call that says where they start, as FlashAttention is told; None if it does not.

    Args:
        mask: of the call, beside which nothing else counts.
        keywords: the others.
    """
    start_C, longest = keywords.get("cu_seq_lens_q"), keywords.get("max_length_q")
    if mask is not None or start_C is None or longest is None:
        return None
    return Sequences(start_C=start_C, longest=int(longest))


def hiding_nothing(shape: torch.Size, device: torch.device) -> Tensor:
    """A 2D mask for a decoder, by which a host knows without waiting for the device that it need not make one.

    Given none, a host looks whether positions begin again, and waits for the answer.

    Args:
        shape: `(B, T)`.
        device: of what the decoder is called with.
    """
    mask_BT = torch.ones((1, 1), dtype=torch.bool, device=device).expand(shape)
    _HIDING_NOTHING[mask_BT] = True
    return mask_BT


def hides_nothing(mask: Any) -> bool:
    """Whether a decoder's mask is known to hide nothing."""
    return isinstance(mask, Tensor) and mask in _HIDING_NOTHING


def _unless_it_hides_nothing(mask_BT: Tensor | None) -> Tensor | None:
    """A mask; None for one of which that is known, which none is that a compiled model is given."""
    if mask_BT is None or torch.compiler.is_compiling():
        return mask_BT
    return None if hides_nothing(mask_BT) else mask_BT


def _has_windows(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return "sliding_attention" in types
    return getattr(config, "sliding_window", None) is not None


def _mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **queries: Any,
) -> Tensor | None:
    """What a step's layers get as their mask.

    None for causal attention over whole samples; the 2D mask where there is padding; otherwise, with a cache of keys, a
    mask of the model's own or padding between tokens, the host's bool mask `(B, 1, T, S)`.
    """
    attention_mask = _unless_it_hides_nothing(attention_mask)
    # later than transformers 5.2 their number, before it their positions
    num_queries = queries["q_length"] if "q_length" in queries else len(queries["cache_position"])
    is_whole = num_queries == kv_length and kv_offset == 0 and not torch.compiler.is_compiling()
    if allow_is_causal_skip and is_whole:
        if attention_mask is None or (is_token_BT := attention_mask[:, -kv_length:]).all():
            return None
        if not _has_gaps(is_token_BT):  # which a window counts, and what lies in one may predict the token behind it
            return is_token_BT
    mask: Tensor = sdpa_mask(
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **queries,
    )
    return mask


def _has_gaps(is_token_BT: Tensor) -> bool:
    """Whether padding lies between tokens of a sample. Waits for the device."""
    begins_B = is_token_BT[:, 0] + (is_token_BT[:, 1:] > is_token_BT[:, :-1]).sum(-1)
    return bool((begins_B > 1).any())


def _mask_beside_sdpa(*, attention_mask: Tensor | None = None, **given: Any) -> Tensor | None:
    """The host's for SDPA, which asks the device what a 2D mask hides."""
    mask: Tensor | None = sdpa_mask(attention_mask=_unless_it_hides_nothing(attention_mask), **given)
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    overwrites: bool = False,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The host's attention function, `(B, T, H, V)`; `overwrites` is ours, see `attend`."""
    is_whole = attention_mask is not None and attention_mask.dim() == 4
    if is_causal is None:  # as the host's for SDPA asks
        is_causal = getattr(module, "is_causal", None)
    if dropout or softcap is not None or (is_causal is False and not is_whole):
        raise ValueError(
            "expertune's attention is causal, without dropout and without capped scores; this layer asked for "
            f"is_causal={is_causal}, dropout={dropout}, softcap={softcap}. Call expertune.optimize(model, "
            "attention='host')."
        )
    sequences = told(attention_mask, keywords)
    if sequences is None and not is_whole:
        are_whole = attention_mask is None and position_ids in _START_NO_SAMPLES
        sequences = None if are_whole else _sequences(attention_mask, position_ids, len(query))
    query, key, value = _in_one_dtype(query, key, value)
    out_BTHV = attend(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        sinks_H=s_aux,
        sequences=sequences,
        mask=attention_mask if is_whole else None,
        overwrites=overwrites,
    )
    return out_BTHV, None


def _attention_beside_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Ours for packed samples of which the batch says where they start (`hosts/samples.py`), else the host's.

    And ours for whole samples, where there is a kernel for them beyond what torch's SDPA has.
    """
    if told(attention_mask, kwargs) is not None:
        return _attention(module, query, key, value, attention_mask, **kwargs)
    is_whole = attention_mask is None and query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    if is_whole and not kwargs.get("dropout") and goes_beyond_sdpa(query, value):
        overwrites = kwargs.get("overwrites", False)
        return _attention(module, query, key, value, None, scaling=kwargs.get("scaling"), overwrites=overwrites)
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out


def _sequences(mask_BT: Tensor | None, position_ids: Tensor | None, batch: int | None = None) -> Sequences | None:
    """The sequences of a batch, found by the first layer, and anew if someone has written into the tensor since.

    Positions of one row are of all rows: `batch` says how many there are, None as many as there are positions.
    """
    key = position_ids if mask_BT is None else mask_BT
    if key is None:
        return None
    rows = len(key) if batch is None else batch
    if key.is_inference():  # it counts no writes
        return _find(key, mask_BT is None, rows)
    if key not in _SEQUENCES or _SEQUENCES[key][0] != key._version:
        _SEQUENCES[key] = (key._version, {})
    by_rows: dict[int, Sequences | None] = _SEQUENCES[key][1]
    if rows not in by_rows:
        by_rows[rows] = _find(key, mask_BT is None, rows)
    return by_rows[rows]


def _find(key: Tensor, are_positions: bool, rows: int) -> Sequences | None:
    return Sequences.of_positions(key.expand(rows, *key.shape[1:])) if are_positions else Sequences.of_padding(key)


def _in_one_dtype(*tensors: Tensor) -> Iterator[Tensor]:
    """Under autocast in its dtype: what the host computes in float32, it would have cast too."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return (x.to(dtype) for x in tensors)
    return iter(tensors)
