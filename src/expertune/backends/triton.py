"""Our Triton kernels: a handful of launches a pass, no wait for the host, the same bits every run.

In Triton's CPU interpreter (`TRITON_INTERPRET=1`) everything but the Hopper kernel runs too, slowly: that is how it is
tested without a GPU. The interpreter computes bfloat16 wrongly (Triton 3.9), so it is refused there.
"""

import os

import torch

from expertune.backends.protocol import Backend, Steps
from expertune.kernels import has_triton
from expertune.shapes import Problem

_OLDEST = (7, 5)
_TENSOR_CORES = (8, 0)  # what Triton 3.6 compiles `dot` to is `fma` for 7.5 and `mma` from here on


def _why_not(problem: Problem) -> str | None:
    if not has_triton():
        return "needs Triton, which is not installed"
    is_interpreted = problem.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device != "cuda" and not is_interpreted:
        return f"needs a CUDA or ROCm device, got {problem.device}"
    dtypes = (torch.float16, torch.float32) if is_interpreted else (torch.bfloat16, torch.float16, torch.float32)
    if problem.dtype not in dtypes:
        return f"needs {', '.join(map(str, dtypes))}, got {problem.dtype}"
    if problem.capability is not None:
        if problem.capability < _OLDEST:
            return f"needs compute capability 7.5 or later, got {'.'.join(map(str, problem.capability))}"
        if problem.dtype == torch.bfloat16 and problem.capability < (8, 0):
            return "needs compute capability 8.0 or later for bfloat16; load the model in float16"
    return problem.why_not_rows()


def _why_slow(problem: Problem) -> str | None:
    if problem.capability is not None and problem.capability < _TENSOR_CORES:
        return "is slow before compute capability 8.0, for which Triton compiles no matrix unit"
    return None


def _steps() -> Steps:
    from expertune.backends.triton_steps import STEPS  # imports Triton, which is optional

    return STEPS


BACKEND = Backend(name="triton", why_not=_why_not, steps=_steps, why_slow=_why_slow)
