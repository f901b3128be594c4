"""What a backend is: two grouped products and a reason why it cannot run."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from expertune.shapes import Problem


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The steps of the walk that differ between backends. Rows lie sorted by expert, as `ends_E` says.

    Args:
        name: what `requested` and the report call it.
        matmul: `(x_NI, w_EIO, ends_E) -> y_NO`, every row times the matrix of its own expert.
        outer: `(u_NO, v_NI, ends_E) -> (E, O, I)`, the sum over each expert's rows of `u ⊗ v`; zero for an expert
            without rows.
        why_not: in words why the backend cannot run a problem ("needs …"), or None if it can. Never raises.
    """

    name: str
    matmul: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]
    why_not: Callable[[Problem], str | None]
