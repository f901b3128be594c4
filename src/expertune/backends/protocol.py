"""What a backend is: the steps of the walk, and a reason why it cannot run.

The walk in `experts.py` is written once over these steps. Rows lie sorted by expert, as the `Dispatch` says.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from expertune.activations import Gate
from expertune.shapes import Dispatch, LoraFactors, Pass, Problem, Tensors
from expertune.weights.dense import DenseWeights


class PackedFactors(NamedTuple):
    """The adapters of one projection, joined along the rank; the scale is folded into `b`. Views: any strides."""

    a_ERI: Tensor
    b_EOR: Tensor


class FactorSide(NamedTuple):
    """What the gradient of one LoRA factor is summed from: `Σ narrow[n] ⊗ wide[n]` over each expert's rows.

    Args:
        wide: `(N, I)` sorted by expert, or with `by_token` `(T, I)`.
        narrow_NR: the low-rank side.
        by_token: whether a row of `wide` is a token.
    """

    wide: Tensor
    narrow_NR: Tensor
    by_token: bool = False


class Steps(Protocol):
    """The steps of the walk that differ between backends."""

    @property
    def adds_in_place(self) -> bool:
        """Whether `factor_grads` adds to sums by the kernels that make the gradients."""
        ...

    def run(self, function: Pass, static: Hashable, inputs: Tensors, ahead: Pass | None = None) -> Tensors:
        """`function(static, inputs)`: a pass of the walk, which calls the other steps.

        Autocast is off in it: it would cast some products and not others, and the base weights' dtype is what counts.

        Args:
            function: pure.
            static: all that decides what it does, beside shapes, strides and dtypes.
            inputs: tensors of one device.
            ahead: does `function` and the passes that will follow it; never run, it says what else to get ready.
        """
        ...

    def bind(self, function: Pass, static: Hashable, first: Tensors) -> Callable[[Tensors], Tensors]:
        """`run` for inputs of which the first stay where they are: a function of the others.

        Args:
            function, static: as for `run`.
            first: those inputs.
        """
        ...

    def dispatch(self, expert_TK: Tensor, num_experts: int) -> Dispatch:
        """Sort the routed rows by expert."""
        ...

    def pack(self, projections: Sequence[tuple[Sequence[LoraFactors], DenseWeights]]) -> list[PackedFactors | None]:
        """Join the adapters of each projection for products beside its weights, in their dtype; None without any."""
        ...

    def gather(self, x_TI: Tensor, a_ERI: Tensor | None, routing: Dispatch) -> tuple[Tensor, Tensor | None]:
        """Tokens copied to rows, `x_NI`, and `x_NI a_ERIᵀ`, `(N, R)`."""
        ...

    def shrink(self, x_NI: Tensor, a_ERI: Tensor, routing: Dispatch) -> Tensor:
        """`x_NI a_ERIᵀ`, `(N, R)`."""
        ...

    def linear(
        self,
        x_NI: Tensor,
        w_EIO: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias_EO: Tensor | None = None,
    ) -> Tensor:
        """`x_NI w_EIO + mid_NR b_ERO + bias_EO`, `(N, O)`, where `low_rank` is `(mid_NR, b_ERO)`."""
        ...

    def gated_linear(
        self,
        gate: Gate,
        x_NI: Tensor,
        w_EIO: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        bias_EO: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`h_NG`, as `linear` gives it, and its gate's `a_NF`."""
        ...

    def linear_gate_backward(
        self,
        gate: Gate,
        dy_NI: Tensor,
        w_EIF: Tensor,
        h_NG: Tensor,
        weight_TK: Tensor,
        routing: Dispatch,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        overwrites: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`a_NF`, `dh_NG` times the router's weight of its row, and `⟨a, da⟩` of every slot, `(T, K)`.

        `da_NF`, the gradient before the router's weight, is what `linear` gives of `dy_NI`, `w_EIF` and `low_rank`.
        `h_NG` may be overwritten with `overwrites`.
        """
        ...

    def combine(self, y_ND: Tensor, weight_TK: Tensor | None, routing: Dispatch) -> Tensor:
        """Each token's rows summed, in a fixed order, with the router's weights or without: `(T, D)`."""
        ...

    def factor_grads(
        self,
        a: FactorSide,
        b: FactorSide,
        adapters: Sequence[LoraFactors],
        routing: Dispatch,
        sums: Tensors,
        weight_TK: Tensor | None = None,
    ) -> list[Tensor | None]:
        """The gradients of a projection's LoRA factors, `a, b` of each adapter, in PEFT's layout and their own dtypes.

        Args:
            a: for the `a`s: the projection's input and the gradient of its mid.
            b: for the `b`s: the gradient of its output and its mid; the scale is multiplied here.
            adapters: in the order in which they were joined.
            routing: where each expert's rows lie.
            sums: of each factor what its gradient is added to in place, contiguous, of any floating dtype; None is then
                given for it. Where there is None, the gradient is given.
            weight_TK: multiplies each row, if given.
        """
        ...

    def outer(self, u_NO: Tensor, v_NI: Tensor, routing: Dispatch, total: Tensor | None = None) -> Tensor | None:
        """`Σ u[n] ⊗ v[n]` over each expert's rows, `(E, O, I)`; zero for an expert without rows.

        With `total`, which is contiguous, it is added to that in place, and None is given.
        """
        ...


def _is_not_slow(_problem: Problem) -> None:
    """Nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run the walk.

    Args:
        name: what `requested` and the report call it.
        why_not: in words why it cannot run a problem ("needs …"), or None if it can. Never raises.
        steps: its steps. What they need is imported by the first call.
        why_slow: in words why another is taken first though it can run ("is slow …"), or None. Never raises.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    steps: Callable[[], Steps]
    why_slow: Callable[[Problem], str | None] = _is_not_slow
