"""What a family file states."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from expertune.activations import Gate


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Args:
        model_types: the `config.model_type` values it covers.
        fused_gate: our own gate, made from an experts module; without one the module's `_apply_gate` runs.
    """

    model_types: tuple[str, ...]
    fused_gate: Callable[[nn.Module], Gate]
