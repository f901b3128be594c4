"""The legend of the package, and the few frozen values that its parts hand to each other.

Shape letters, used as suffixes of tensor names everywhere:
`T` tokens · `K` experts per token · `N = T·K` routed rows, sorted by expert · `E` experts · `D` model width ·
`F` expert width · `G` width of the first projection (`2F` with a gate, `F` without) · `R` LoRA rank ·
`I, O` input and output width of any linear. So `x_TD`, `w_EOI`, `ends_E`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

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


class RoutingShape(NamedTuple):
    """What the sizes of a routing follow from.

    Args:
        num_tokens: `T`.
        top_k: `K`.
        num_experts: `E`.
        tile_rows: rows a tile, or None where the rows are not cut into tiles.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    tile_rows: int | None = None

    @classmethod
    def of(cls, expert_TK: Tensor, num_experts: int, tile_rows: int | None = None) -> "RoutingShape":
        """The shape of a router's choice."""
        num_tokens, top_k = expert_TK.shape
        return cls(num_tokens, top_k, num_experts, tile_rows)

    @property
    def num_rows(self) -> int:
        """`N`."""
        return self.num_tokens * self.top_k

    @property
    def max_tiles(self) -> int:
        """The most tiles that any choice can need: every expert with rows may have one tile that is not full."""
        if self.tile_rows is None:
            return 0
        return -(-self.num_rows // self.tile_rows) + min(self.num_experts, self.num_rows)


class RoutingRule(NamedTuple):
    """How a router comes from logits to choice and scores.

    Args:
        top_k: experts a token.
        is_sigmoid: whether scores are sigmoids of the logits; else their softmax.
        is_normed: whether the scores of the chosen are divided by their sum.
        scale: multiplies the scores.
        num_groups: into which the experts are cut, in order.
        top_groups: those of a token's choice: where the two best experts are best together (DeepSeek-V3).
    """

    top_k: int
    is_sigmoid: bool
    is_normed: bool
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    @property
    def eps(self) -> float:
        """Is added to the sum by which scores are divided."""
        return 1e-20 if self.is_sigmoid else 0.0  # as the hosts that normalise sigmoids do


@dataclass(frozen=True)
class Dispatch:
    """Where each routed row comes from and where each token's rows lie: one int32 tensor, and views of it.

    One, because a step hands it on, keeps it for backward and allocates it once a layer.

    Args:
        shape: the sizes of its parts.
        words: all parts, one behind the other.
    """

    shape: RoutingShape
    words: Tensor

    @classmethod
    def empty(cls, shape: RoutingShape, device: torch.device) -> "Dispatch":
        """One to be written to."""
        return cls(shape, torch.empty(_parts(shape)[-1].stop, dtype=torch.int32, device=device))

    @property
    def top_k(self) -> int:
        """`K`."""
        return self.shape.top_k

    @cached_property
    def row_slot_N(self) -> Tensor:
        """The slot `t·K + k` that a row copies: token `t`, its `k`-th choice."""
        return self._part(0)

    @cached_property
    def row_expert_N(self) -> Tensor:
        """The expert that a row goes to; ascending."""
        return self._part(1)

    @cached_property
    def token_row_TK(self) -> Tensor:
        """The rows of a token, in the order of its router weights."""
        return self._part(2).view(self.shape.num_tokens, self.shape.top_k)

    @cached_property
    def ends_E(self) -> Tensor:
        """Expert `e` owns rows `ends_E[e-1]` to `ends_E[e]`."""
        return self._part(3)

    @cached_property
    def tiles(self) -> Tiles:
        """The rows cut into tiles, for backends that need them."""
        assert self.shape.tile_rows is not None
        expert, row, count = (self._part(i) for i in (4, 5, 6))
        return Tiles(rows=self.shape.tile_rows, expert=expert, row=row, count=count, ends_E=self.ends_E)

    @cached_property
    def row_token_N(self) -> Tensor:
        """The token that a row copies."""
        return self.row_slot_N // max(self.top_k, 1)

    def by_row(self, weight_TK: Tensor) -> Tensor:
        """The router's weight of each row, `(N, 1)`."""
        return weight_TK.reshape(-1, 1).index_select(0, self.row_slot_N)

    def _part(self, number: int) -> Tensor:
        return self.words[_parts(self.shape)[number]]


@lru_cache(maxsize=256)
def _parts(shape: RoutingShape) -> list[slice]:
    """Where the parts of a routing lie in its words; each starts where vector loads may."""
    num_rows, most = shape.num_rows, max(shape.max_tiles, 1)
    tiles = () if shape.tile_rows is None else (most, most, 1)
    parts, start = [], 0
    for length in (num_rows, num_rows, num_rows, shape.num_experts, *tiles):
        parts.append(slice(start, start + length))
        start = -(-(start + length) * 4 // ALIGNMENT) * ALIGNMENT // 4
    return parts


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

    @classmethod
    def of(cls, layout: ExpertsLayout, dtype: torch.dtype, device: torch.device, *, is_dense: bool = True) -> "Problem":
        """The walk over experts that lie so, computed in a dtype on a device."""
        return cls(
            device=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype=dtype,
            widths=(layout.model_width, layout.first_width, layout.expert_width),
            is_dense=is_dense,
        )

    def why_not_rows(self) -> str | None:
        """Why a backend that reads whole multiples of `ALIGNMENT` cannot run it, or None if it can."""
        if bad := sorted({width for width in self.widths if width * self.dtype.itemsize % ALIGNMENT}):
            return f"needs rows that are multiples of {ALIGNMENT} bytes, got widths {bad} in {self.dtype}"
        if not self.is_dense:
            return f"needs contiguous weights that start at a multiple of {ALIGNMENT} bytes"
        return None
