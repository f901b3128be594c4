"""The legend of the package, and the few frozen values that its parts hand to each other.

Shape letters, used as suffixes of tensor names everywhere:
`T` tokens · `K` experts per token · `N = T·K` routed rows, sorted by expert · `E` experts · `D` model width ·
`F` expert width · `G` width of the first projection (`2F` with a gate, `F` without) · `R` LoRA rank ·
`I, O` input and output width of any linear. So `x_TD`, `w_EOI`, `ends_E`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]
Pass: TypeAlias = Callable[[Any, Tensors], Tensors]  # from what is static, and tensors
ALIGNMENT = 16  # bytes that vector loads, `cp.async` and tensor-memory descriptors read at once


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout:
    """How a host lays out the experts of one layer.

    Args:
        num_experts: `E`.
        model_width: `D`.
        expert_width: `F`.
        has_gate: whether the first projection yields gate and up (`G = 2F`) or up alone (`G = F`).
        is_transposed: whether weights lie as `(E, I, O)` instead of `(E, O, I)`.
        has_bias: whether both projections add a bias of shape `(E, O)`.
    """

    num_experts: int
    model_width: int
    expert_width: int
    has_gate: bool
    is_transposed: bool
    has_bias: bool

    def __post_init__(self) -> None:
        for name in ("num_experts", "model_width", "expert_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def first_width(self) -> int:
        """`G`, what the first projection yields."""
        return 2 * self.expert_width if self.has_gate else self.expert_width


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """One active adapter on one projection of the experts, in PEFT's own layout (0.19.1 and later).

    Args:
        a: `(E·R, I)`, expert-major: read as `(E, R, I)`.
        b: `(O, R·E)`, expert-fastest: read as `(O, R, E)`.
        scale: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Runs of rows that belong to one expert each, listed on the device. All int32.

    Args:
        rows: rows a tile, at most.
        expert: the expert of each tile.
        row: the first row of each tile.
        count: how many tiles there are; one element. What lies beyond in the lists was never written.
        ends_E: expert `e` owns rows `ends_E[e-1]` to `ends_E[e]`.
    """

    rows: int
    expert: Tensor
    row: Tensor
    count: Tensor
    ends_E: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a backend needs to know to say whether it can run.

    Args:
        device: device type, "cpu" or "cuda".
        capability: CUDA compute capability, or None elsewhere.
        dtype: what the matrix products are computed in.
        widths: every row width that is multiplied, in elements.
        is_dense: whether every weight is contiguous and starts at a multiple of `ALIGNMENT`.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    widths: tuple[int, ...]
    is_dense: bool = True

    def why_not_rows(self) -> str | None:
        """Why a backend that reads whole multiples of `ALIGNMENT` cannot run it, or None if it can."""
        if bad := sorted({width for width in self.widths if width * self.dtype.itemsize % ALIGNMENT}):
            return f"needs rows that are multiples of {ALIGNMENT} bytes, got widths {bad} in {self.dtype}"
        if not self.is_dense:
            return f"needs contiguous weights that start at a multiple of {ALIGNMENT} bytes"
        return None
