"""Gate functions: what turns the first projection `h_NG` into `a_NF`, forward and backward.

A gate's backward also yields `a_NF` again, because the walk recomputes it instead of keeping it.
`SwiGlu` and its kin are written out; any other function of the host runs through `HostGate`: right, but slower.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Gate(Hashable, Protocol):
    """`forward(h_NG) -> a_NF` and `backward(h_NG, da_NF) -> (a_NF, dh_NG)`."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def forward(self, h_NG: Tensor) -> Tensor:
        """The activation, `(N, F)`."""
        ...

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        """The activation again and the gradient of `h_NG`."""
        ...


def _halves(h_NG: Tensor, is_concatenated: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up: `[gate | up]`, or interleaved `[gate0, up0, gate1, up1, …]`."""
    if is_concatenated:
        gate_NF, up_NF = h_NG.chunk(2, dim=-1)
        return gate_NF, up_NF
    return h_NG[..., ::2], h_NG[..., 1::2]


@dataclass(frozen=True)
class SwiGlu:
    """`silu(gate) · up` (Shazeer 2020, "GLU Variants Improve Transformer")."""

    is_concatenated: bool = True
    name: str = "silu"

    def forward(self, h_NG: Tensor) -> Tensor:
        gate_NF, up_NF = _halves(h_NG, self.is_concatenated)
        return F.silu(gate_NF).mul_(up_NF)

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = _halves(h_NG, self.is_concatenated)
        dh_NG = torch.empty_like(h_NG)
        dgate_NF, dup_NF = _halves(dh_NG, self.is_concatenated)
        silu_NF = F.silu(gate_NF)
        torch.mul(da_NF, silu_NF, out=dup_NF)
        dgate_NF.copy_(torch.ops.aten.silu_backward(da_NF * up_NF, gate_NF))
        return silu_NF.mul_(up_NF), dh_NG


@dataclass(frozen=True)
class GeGlu:
    """`gelu(gate) · up`, exact (`approximate="none"`) or by tanh."""

    approximate: str
    is_concatenated: bool = True

    @property
    def name(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"

    def forward(self, h_NG: Tensor) -> Tensor:
        gate_NF, up_NF = _halves(h_NG, self.is_concatenated)
        return F.gelu(gate_NF, approximate=self.approximate).mul_(up_NF)

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = _halves(h_NG, self.is_concatenated)
        dh_NG = torch.empty_like(h_NG)
        dgate_NF, dup_NF = _halves(dh_NG, self.is_concatenated)
        gelu_NF = F.gelu(gate_NF, approximate=self.approximate)
        torch.mul(da_NF, gelu_NF, out=dup_NF)
        dgate_NF.copy_(torch.ops.aten.gelu_backward(da_NF * up_NF, gate_NF, approximate=self.approximate))
        return gelu_NF.mul_(up_NF), dh_NG


@dataclass(frozen=True)
class ClampedSwiGlu:
    """`g·sigmoid(α·g) · (u + shift)`, with `g` clamped from above and `u` from both sides at `limit`.

    With a shift of one it is gpt-oss's gate, with none DeepSeek-V4's. Sources: GptOssExperts, DeepseekV4Experts,
    transformers 5.24. The gradient is zero beyond a clamp and passes at the limit itself.

    Args:
        alpha: of the sigmoid.
        limit: of the clamps.
        shift: 0 or 1.
        is_concatenated: `[gate | up]`, else interleaved.
        name: what the report calls it.
    """

    alpha: float
    limit: float
    shift: float = 1.0
    is_concatenated: bool = False
    name: str = "clamped silu"

    def _parts(self, h_NG: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        gate_NF, up_NF = _halves(h_NG, self.is_concatenated)
        g_NF = gate_NF.clamp(max=self.limit)
        u_NF = up_NF.clamp(min=-self.limit, max=self.limit)
        return gate_NF, up_NF, g_NF, u_NF.add_(self.shift), torch.sigmoid(g_NF * self.alpha)

    def forward(self, h_NG: Tensor) -> Tensor:
        _, _, g_NF, u1_NF, sigmoid_NF = self._parts(h_NG)
        return g_NF.mul_(sigmoid_NF).mul_(u1_NF)

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF, g_NF, u1_NF, sigmoid_NF = self._parts(h_NG)
        dh_NG = torch.empty_like(h_NG)
        dgate_NF, dup_NF = _halves(dh_NG, self.is_concatenated)
        glu_NF = g_NF * sigmoid_NF
        torch.mul(da_NF, glu_NF, out=dup_NF)
        dup_NF.masked_fill_(up_NF.abs() > self.limit, 0)
        # d(g·σ(αg))/dg = σ + α·g·σ·(1 − σ)
        slope_NF = glu_NF.mul(self.alpha).mul_(1 - sigmoid_NF).add_(sigmoid_NF)
        dgate_NF.copy_(slope_NF.mul_(u1_NF).mul_(da_NF))
        dgate_NF.masked_fill_(gate_NF > self.limit, 0)
        return glu_NF.mul_(u1_NF), dh_NG


@dataclass(frozen=True)
class ReluSquared:
    """`relu(h)²` of experts without a gate (So et al. 2021, "Primer")."""

    name: str = "relu², no gate"

    def forward(self, h_NG: Tensor) -> Tensor:
        return F.relu(h_NG).square_()

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        relu_NF = F.relu(h_NG)
        return relu_NF.square(), relu_NF.mul_(2).mul_(da_NF)


@dataclass(frozen=True)
class HostGate:
    """Any differentiable function of the host, differentiated by autograd. It must hold no trained parameter."""

    function: Callable[[Tensor], Tensor]
    name: str = "host's own"

    def forward(self, h_NG: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(h_NG)

    def backward(self, h_NG: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            h_NG = h_NG.detach().requires_grad_()
            a_NF = self.function(h_NG)
            (dh_NG,) = torch.autograd.grad(a_NF, h_NG, da_NF)
        return a_NF.detach(), dh_NG
