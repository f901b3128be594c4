"""A frozen linear with Split LoRA or without, `xW + s(xA)B`, during one pass: its products and their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertune import kernels
from expertune.kernels.device import cache_bytes


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
        if self.bias_O is None:
            torch.mm(x_NI, self.weight_OI.mT, out=out_NO)
        else:
            torch.addmm(self.bias_O, x_NI, self.weight_OI.mT, out=out_NO)
        mid_NR = self.mid(x_NI)
        if mid_NR is not None and self.b_OR is not None:
            _add_product(out_NO, mid_NR, self.b_OR.mT, self.scale)
        return mid_NR

    def dmid(self, dy_NO: Tensor) -> Tensor | None:
        """The gradient of `mid`."""
        return None if self.b_OR is None else _product(dy_NO, self.b_OR, dy_NO.dtype, self.scale)

    def input_grad(self, dy_NO: Tensor, dmid_NR: Tensor | None, out_NI: Tensor | None = None) -> Tensor:
        """`dx_NI`, added to `out_NI` if that is given."""
        dx_NI = dy_NO @ self.weight_OI if out_NI is None else out_NI.addmm_(dy_NO, self.weight_OI)
        if self.a_RI is not None and dmid_NR is not None:
            _add_product(dx_NI, dmid_NR, self.a_RI)
        return dx_NI

    def a_grad(self, x_NI: Tensor, dmid_NR: Tensor | None) -> Tensor | None:
        """`da_RI`."""
        return None if dmid_NR is None else _product(dmid_NR.mT, x_NI, self.dtypes[0])

    def b_grad(self, dy_NO: Tensor, mid_NR: Tensor | None) -> Tensor | None:
        """`db_OR`."""
        return None if mid_NR is None else _product(dy_NO.mT, mid_NR, self.dtypes[1], self.scale)


def _add_product(y_NC: Tensor, left_NR: Tensor, right_RC: Tensor, scale: float = 1.0) -> None:
    """`y += scale · left right`, in place: by our kernel where `y` is larger than the card's cache, else by torch's."""
    is_ours = not torch.compiler.is_compiling() and y_NC.itemsize == 2 and kernels.computes(y_NC)
    if is_ours and y_NC.nbytes > cache_bytes(y_NC.device):
        from expertune.kernels.low_rank import MOST_RANKS, add_product  # imports Triton, which is optional

        if len(right_RC) <= MOST_RANKS:
            add_product(y_NC, left_NR, right_RC, scale)
            return
    y_NC.addmm_(left_NR, right_RC, alpha=scale)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """`scale · left @ right` in `dtype`, scaled before it is rounded.

    On CUDA a float32 product of 16-bit factors is not rounded to 16 bits on the way.
    """
    shape = len(left), right.shape[1]
    is_cuda = left.is_cuda and torch.version.hip is None
    if is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        out = left.new_empty(shape, dtype=dtype)
        return torch.addmm(out, left, right, out_dtype=dtype, beta=0, alpha=scale, out=out)
    return left.new_empty(shape).addmm_(left, right, beta=0, alpha=scale).to(dtype)
