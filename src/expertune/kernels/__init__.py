"""Triton device code and its launchers, one operation a file. Nothing is compiled or probed on import."""

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is installed: what is in this package's files imports it, and can be imported only then."""
    return importlib.util.find_spec("triton") is not None
