"""`torch.nn.functional.grouped_mm` (torch 2.10 and later): one launch a product, no wait for the host.

The fast kernel is Hopper's and datacentre Blackwell's, in bfloat16. On other cards and dtypes torch loops inside and
waits for the host (aten/src/ATen/native/GroupedMMUtils.h, torch 2.13), but gives the same result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from expertune.backends.protocol import Backend
from expertune.backends.torch_steps import TorchSteps
from expertune.shapes import Problem


def matmul(x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`y[n] = x[n] @ w[e(n)]`, shape `(N, O)`."""
    return F.grouped_mm(x_NI, w_EIO, offs=ends_E)


def outer(u_NO: Tensor, v_NI: Tensor, ends_E: Tensor) -> Tensor:
    """`Σ u[n] ⊗ v[n]` over each expert's rows, shape `(E, O, I)`."""
    return F.grouped_mm(u_NO.T, v_NI, offs=ends_E)


def _why_not(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"needs bfloat16, float16 or float32, got {problem.dtype}"
    if problem.device == "cuda" and problem.capability is not None and problem.capability < (8, 0):
        return f"needs compute capability 8.0 or later, got {'.'.join(map(str, problem.capability))}"
    if problem.device not in ("cpu", "cuda"):
        return f"needs a CPU or CUDA device, got {problem.device}"
    return problem.why_not_rows()


def _steps() -> TorchSteps:
    return STEPS


STEPS = TorchSteps(matmul=matmul, outer_product=outer)
BACKEND = Backend(name="grouped_mm", why_not=_why_not, steps=_steps)
