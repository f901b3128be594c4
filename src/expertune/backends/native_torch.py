"""Plain torch, one expert after another: runs everywhere, in every dtype, and waits for the device once a product.

It is also the definition of both products; tests trust it.
"""

import torch
from torch import Tensor

from expertune.backends.protocol import Backend
from expertune.backends.torch_steps import TorchSteps
from expertune.shapes import Problem


def matmul(x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`y[n] = x[n] @ w[e(n)]`, shape `(N, O)`."""
    y_NO = x_NI.new_empty((x_NI.shape[0], w_EIO.shape[2]))
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_NI[start:end], w_EIO[expert], out=y_NO[start:end])
        start = end
    return y_NO


def outer(u_NO: Tensor, v_NI: Tensor, ends_E: Tensor) -> Tensor:
    """`Σ u[n] ⊗ v[n]` over each expert's rows, shape `(E, O, I)`."""
    out_EOI = u_NO.new_empty((ends_E.shape[0], u_NO.shape[1], v_NI.shape[1]))
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(u_NO[start:end].T, v_NI[start:end], out=out_EOI[expert])
        start = end
    return out_EOI


def _why_not(problem: Problem) -> str | None:
    if not problem.dtype.is_floating_point or problem.dtype.itemsize < 2:
        return f"needs float16, bfloat16, float32 or float64, got {problem.dtype}"
    return None


def _steps() -> TorchSteps:
    return STEPS


STEPS = TorchSteps(matmul=matmul, outer_product=outer)
BACKEND = Backend(name="native_torch", why_not=_why_not, steps=_steps)
