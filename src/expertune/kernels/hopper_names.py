"""What Gluon calls by another name from version to version: one name for Triton 3.6 to 3.9."""

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# the copy of a tile to shared memory by the tensor memory accelerator; the longer name up to 3.7
copy_tile: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # from 3.9 on


@gluon.jit
def as_matrix(buffer, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The same shared memory as so many rows and columns, in the buffer's layout."""
    if _HAS_REINTERPRET:
        matrix = buffer.reinterpret(buffer.dtype, [ROWS, COLUMNS], buffer.type.layout)
    else:
        matrix = buffer._reinterpret(buffer.dtype, [ROWS, COLUMNS], buffer.type.layout)
    return matrix
