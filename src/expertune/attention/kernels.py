"""What an attention kernel is, and which one runs."""

import collections.abc as abc
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from expertune.attention.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which keys a query attends to, and how scores are scaled.

    Causal, unless `mask` says all: query `t` attends to keys up to `t`.

    Args:
        scale: of the products of queries and keys.
        window: keys that a query attends to at most, itself among them; None for all before it.
        sequences: of the rows of a batch of one; None for one sequence a sample.
        mask: `(B, 1 or H, T, S)`; bool, true where a query attends, or added to the scores. The rest counts no more.
        has_sinks: whether a score of each head takes a share of the softmax and gives nothing.
        overwrites: whether backward may write over queries, keys and values: nobody else has them.
        overwrites_gradient: whether it may write over the gradient that comes in.
    """

    scale: float
    window: int | None = None
    sequences: Sequences | None = None
    mask: Tensor | None = None
    has_sinks: bool = False
    overwrites: bool = False
    overwrites_gradient: bool = False


class Attended(NamedTuple):
    """What a kernel's forward yields.

    Args:
        out_BTHV: in the dtype of the queries.
        lse_BHT: the logarithm of the sum of a query's exponentials, float32 (float64 for float64 queries).
        state: what the kernel wants back in backward.
    """

    out_BTHV: Tensor
    lse_BHT: Tensor
    state: tuple[Tensor, ...] = ()


class Kernel(Protocol):
    """One way to attend. A backward takes any `out` and `lse`, which is how sinks come in; see `sinks.py`."""

    name: str

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here, in words; None if it can."""
        ...

    def forward(
        self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern, sinks_H: Tensor | None = None
    ) -> Attended:
        """Attend."""
        ...

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values, in their shapes."""
        ...


def choose(kernels: abc.Sequence[Kernel], q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> tuple[Kernel, list[str]]:
    """The first kernel that can run, and why those before it cannot."""
    passed_over: list[str] = []
    for kernel in kernels:
        reason = kernel.why_not(q_BHTD, v_BJSV, pattern)
        if reason is None:
            return kernel, passed_over
        passed_over.append(f"{kernel.name}: {reason}")
    raise ValueError(f"no attention kernel can run: {'; '.join(passed_over)}")
