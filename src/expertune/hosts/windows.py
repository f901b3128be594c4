"""Sliding windows of attentions: what a layer was made with, and what its config says of it now."""

from collections.abc import Iterable
from operator import ne
from typing import Any


def held(attention: Any) -> int | None:
    """The window that an attention was made with; some hold one that they do not use."""
    window: int | None = attention.sliding_window if getattr(attention, "is_sliding", True) else None
    return window


def said_of(attention: Any, config: Any) -> int | None:
    """The window that a config says an attention has, which was made of it."""
    types, place = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    is_windowed = types is None or place is None or list(types[place : place + 1]) == ["sliding_attention"]
    return getattr(config, "sliding_window", None) if is_windowed else None


def said(config: Any) -> tuple[Any, ...]:
    """What a config says of windows. Layers read it when they are made, the host's masks at every call."""
    return getattr(config, "sliding_window", None), *(getattr(config, "layer_types", None) or ())


def refuse_others(config: Any, before: Iterable[tuple[Any, tuple[Any, ...]]]) -> None:
    """Refuse a config that has been changed since layers were made of it: ours attends by these.

    Args:
        config: a decoder's, which attends through ours.
        before: configs, each with what it said when its decoder was taken over.

    Raises:
        ValueError: says what to do.
    """
    if any(each is config and _differ(said(config), then) for each, then in before):
        raise ValueError(
            f"sliding_window or layer_types of {type(config).__name__} was changed after the model was made, and its "
            "layers hold what it said before. Load the model with the config that you want, or call "
            "expertune.restore(model), and expertune.optimize(model) again if it has experts: its attention is then "
            "left to the host."
        )


def _differ(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    """Whether a config says something else of a layer; it may have become one of fewer layers, or of more."""
    (window, *types), (window_then, *types_then) = now, then
    return window != window_then or bool(types) != bool(types_then) or any(map(ne, types, types_then))
