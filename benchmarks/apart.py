"""Packed samples kept apart where Transformers lets them see each other, so that losses can be compared."""

from typing import Any

import torch
from torch import Tensor, nn


def keep_samples_apart(decoder: nn.Module) -> None:
    """Give gpt-oss the masks of packed samples: it hands the host's own no positions, by which samples are told.

    Other models' samples are apart.

    Args:
        decoder: Transformers' own, without its head.
    """
    if decoder.config.model_type == "gpt_oss":
        decoder.register_forward_pre_hook(_with_masks, with_kwargs=True)


def _with_masks(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs["position_ids"]
    masks = {
        "full_attention": _mask(positions, decoder.dtype),
        "sliding_attention": _mask(positions, decoder.dtype, decoder.config.sliding_window),
    }
    return args, kwargs | {"attention_mask": masks}


def _mask(positions: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """What is added to scores, `(B, 1, T, T)`: a token sees itself and those before it in its sample.

    Args:
        positions: `(B, T)`, which begin at zero in each sample.
        dtype: of scores.
        window: tokens that one sees, itself among them.
    """
    sample = (positions == 0).cumsum(-1)
    place = torch.arange(positions.shape[-1], device=positions.device)
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or len(place))) & (sample[:, :, None] == sample[:, None, :])
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)[:, None]
