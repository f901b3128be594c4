"""Triton device code and its launchers, one operation a file. Nothing is compiled or probed on import."""

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is installed: what is in this package's files imports it, and can be imported only then."""
    return importlib.util.find_spec("triton") is not None


def computes(x: Tensor) -> bool:
    """Whether kernels that take any tensor of up to 32 bits a number can compute with this one."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()
