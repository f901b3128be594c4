"""Spans: from which key on a query attends, and how many queries attend to a key.

Attention is causal, so both runs have the row itself at one end; at the other is the end of its sample or of a window.
Any Triton target.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import ceil_div, launch

_ROWS = 256  # of a program


class Spans(NamedTuple):
    """Of the rows of a sample, or of packed ones.

    Args:
        most: keys that a query attends to at most, itself among them: a window, or the longest sample.
        first_T: the first key that a query attends to, int32.
        reach_T: how many queries attend to a key, itself and those behind it, int32.
    """

    most: int
    first_T: Tensor
    reach_T: Tensor

    def band(self, keys: int) -> int:
        """Columns for all queries that reach a block of so many keys, in whole blocks."""
        return ceil_div(self.most + keys - 1, keys) * keys


def empty_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of four-byte numbers that begin at multiples of 16 bytes each, which the tensor memory accelerator wants."""
    *others, length = shape
    return torch.empty((*others, ceil_div(length, 4) * 4), dtype=dtype, device=device)[..., :length]


@triton.jit(do_not_specialize=["T", "num_samples", "most"])
def _attention_spans_kernel(start_ptr, first_ptr, reach_ptr, T, num_samples, most, ROWS: tl.constexpr):
    """One program a block of rows, whose samples are found by bisection."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, end = row * 0, row * 0 + T
    low, high = row * 0, row * 0 + num_samples
    remaining = num_samples
    while remaining > 1:
        middle = (low + high) // 2
        is_right = tl.load(start_ptr + middle) <= row
        low, high = tl.where(is_right, middle, low), tl.where(is_right, high, middle)
        remaining = (remaining + 1) // 2
    if num_samples > 0:
        first, end = tl.load(start_ptr + low), tl.load(start_ptr + high)
    tl.store(first_ptr + row, tl.maximum(first, row - most + 1), row < T)
    tl.store(reach_ptr + row, tl.minimum(end - row, most), row < T)


def spans(length: int, most: int, start_C: Tensor | None, device: torch.device) -> Spans:
    """Those of `length` rows; both tensors begin at multiples of 16 bytes.

    Args:
        length: rows.
        most: keys that a query attends to at most, itself among them.
        start_C: int32 `(C + 1,)`; packed sample `c` is the rows from `start_C[c]` to `start_C[c + 1]`, and some may be
            empty. None for one sample.
        device: where.
    """
    first, reach = empty_rows(2, length, dtype=torch.int32, device=device)
    launch(
        _attention_spans_kernel,
        (ceil_div(length, _ROWS), 1, 1),
        (first if start_C is None else start_C, first, reach),
        (length, 0 if start_C is None else start_C.numel() - 1, most),
        (),
        {"ROWS": _ROWS},
        num_warps=4,
    )
    return Spans(most, first, reach)
