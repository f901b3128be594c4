"""Dense weights: one floating-point tensor a projection, as the host holds it. Nothing is ever copied."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseWeights:
    """A projection's weights, `(E, O, I)`, or `(E, I, O)` where the host keeps them transposed."""

    tensor: Tensor
    is_transposed: bool

    @property
    def w_EIO(self) -> Tensor:
        """A view to multiply rows of width `I` with, in forward."""
        return self.tensor if self.is_transposed else self.tensor.mT

    @property
    def w_EOI(self) -> Tensor:
        """A view to multiply gradients of width `O` with, in backward."""
        return self.tensor.mT if self.is_transposed else self.tensor
