"""A frozen linear with Split LoRA or without, `xW + s(xA)B`, during one pass: its products and their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertune import kernels
from expertune.kernels.device import cache_bytes
from expertune.shapes import LoraFactors


class Linear(NamedTuple):
    """A frozen linear, with an adapter that is trained or without.

    Args:
        weight_OI: frozen.
        bias_O: frozen, or None.
        adapter: factors `(R, I)` and `(O, R)`, or None.
    """

    weight_OI: Tensor
    bias_O: Tensor | None = None
    adapter: LoraFactors | None = None


class SplitLinear(NamedTuple):
    """What a pass reads, in one dtype.

    Args:
        weight_OI: frozen.
        bias_O: frozen, or None.
        a_RI, b_OR: the adapter's factors, cast to the dtype of the weight; None without an adapter.
        scale: multiplies what the adapter adds.
        dtypes: of the factors themselves, in which their gradients are given.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor | None
    b_OR: Tensor | None
    scale: float
    dtypes: tuple[torch.dtype, torch.dtype]

    def mid(self, x_NI: Tensor) -> Tensor | None:
        """`x_NI a_RIᵀ`."""
        return None if self.a_RI is None else x_NI @ self.a_RI.mT

    def forward(self, x_NI: Tensor, out_NO: Tensor) -> Tensor | None:
        """Fill `out_NO`, and give `mid`."""
        mid_NR = self.mid(x_NI)
        self.fill(out_NO, x_NI, mid_NR)
        return mid_NR

    def fill(self, out_NO: Tensor, x_NI: Tensor, mid_NR: Tensor | None) -> None:
        """`forward`, where `mid` is known."""
        if self.bias_O is None:
            torch.mm(x_NI, self.weight_OI.mT, out=out_NO)
        else:
            torch.addmm(self.bias_O, x_NI, self.weight_OI.mT, out=out_NO)
        if mid_NR is not None and self.b_OR is not None:
            add_product(out_NO, mid_NR, self.b_OR.mT, self.scale)

    def dmid(self, dy_NO: Tensor, out_NR: Tensor | None = None) -> Tensor | None:
        """The gradient of `mid`, written to `out_NR` if that is given."""
        if self.b_OR is None:
            return None
        dmid_NR = dy_NO.new_empty((len(dy_NO), self.b_OR.shape[1])) if out_NR is None else out_NR
        return dmid_NR.addmm_(dy_NO, self.b_OR, beta=0, alpha=self.scale)

    def input_grad(self, dy_NO: Tensor, dmid_NR: Tensor | None, out_NI: Tensor | None = None) -> Tensor:
        """`dx_NI`, added to `out_NI` if that is given; without what the adapter adds where `dmid` is not."""
        dx_NI = dy_NO @ self.weight_OI if out_NI is None else out_NI.addmm_(dy_NO, self.weight_OI)
        if self.a_RI is not None and dmid_NR is not None:
            add_product(dx_NI, dmid_NR, self.a_RI)
        return dx_NI

    def a_grad(self, x_NI: Tensor, dmid_NR: Tensor | None) -> Tensor | None:
        """`da_RI`."""
        return None if dmid_NR is None else product(dmid_NR.mT, x_NI, self.dtypes[0])

    def b_grad(self, dy_NO: Tensor, mid_NR: Tensor | None) -> Tensor | None:
        """`db_OR`."""
        return None if mid_NR is None else product(dy_NO.mT, mid_NR, self.dtypes[1], self.scale)


def add_product(y_NC: Tensor, left_NR: Tensor, right_RC: Tensor, scale: float = 1.0) -> None:
    """`y += scale · left right`, in place: by our kernel where `y` is larger than the card's cache, else by torch's."""
    is_ours = not torch.compiler.is_compiling() and y_NC.itemsize == 2 and kernels.computes(y_NC)
    if is_ours and y_NC.nbytes > cache_bytes(y_NC.device):
        from expertune.kernels import low_rank  # imports Triton, which is optional

        if len(right_RC) <= low_rank.MOST_RANKS:
            low_rank.add_product(y_NC, left_NR, right_RC, scale)
            return
    y_NC.addmm_(left_NR, right_RC, alpha=scale)


def product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """`scale · left @ right` in `dtype`, scaled before it is rounded.

    On CUDA a float32 product of 16-bit factors is not rounded to 16 bits on the way.
    """
    shape = len(left), right.shape[1]
    is_cuda = left.is_cuda and torch.version.hip is None
    if is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        out = left.new_empty(shape, dtype=dtype)
        return torch.addmm(out, left, right, out_dtype=dtype, beta=0, alpha=scale, out=out)
    return left.new_empty(shape).addmm_(left, right, beta=0, alpha=scale).to(dtype)
