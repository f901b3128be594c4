"""Which rows of a batch are one sequence: found once a step, from padding or from positions that start again."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST = 256  # rows: of fewer, a kernel's tiles are the same


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of a batch whose rows lie one after the other, `N` of them, padding left out.

    Args:
        start_C: int32 `(C + 1,)`; sequence `c` is the rows from `start_C[c]` to `start_C[c + 1]`.
        longest: rows of the longest.
        row_N: where each row lies in the batch, flat; None where all of the batch counts.
    """

    start_C: Tensor
    longest: int
    row_N: Tensor | None = None

    @classmethod
    def of_padding(cls, is_token_BT: Tensor) -> "Sequences":
        """One sequence a sample; padding may lie left, right or in between. Waits for the device."""
        lengths_B = is_token_BT.sum(-1, dtype=torch.int32)
        row_N = is_token_BT.flatten().nonzero().flatten()
        return cls(start_C=_starts(lengths_B), longest=int(lengths_B.max()), row_N=row_N)

    @classmethod
    def of_positions(cls, position_BT: Tensor) -> "Sequences | None":
        """A sequence starts where positions start again, at zero. None if that is nowhere in a sample.

        Waits for the device.
        """
        is_first_BT = F.pad(position_BT[:, 1:] == 0, (1, 0), value=True)
        first_C = is_first_BT.flatten().nonzero().flatten()
        if first_C.numel() == position_BT.shape[0]:
            return None
        lengths_C = F.pad(first_C, (0, 1), value=position_BT.numel()).diff().int()
        return cls(start_C=_starts(lengths_C), longest=int(lengths_C.max()))

    def rounded(self, num_rows: int) -> "Sequences":
        """The same with empty sequences behind and a longest that is not reached, so that there are few kinds.

        Args:
            num_rows: of the batch, which no sequence exceeds.
        """
        num_more = _power_of_four(self.start_C.numel() - 1) + 1 - self.start_C.numel()
        longest = min(num_rows, max(_SHORTEST, _power_of_four(self.longest)))
        return replace(self, start_C=F.pad(self.start_C, (0, num_more), value=num_rows), longest=longest)

    def of_rows(self, row_N: Tensor) -> Tensor:
        """The number of the sequence in which each of some rows lies. Waits for nothing."""
        return torch.searchsorted(self.start_C, row_N.to(self.start_C.dtype), right=True) - 1

    def take(self, x_BHTD: Tensor) -> Tensor:
        """The rows of a batch as one sample, `(1, H, N, D)`."""
        x_BTHD = x_BHTD.transpose(1, 2)
        x_NHD = x_BTHD.flatten(0, 1)
        rows = x_NHD if self.row_N is None else x_NHD[self.row_N]
        return rows[None].transpose(1, 2)

    def put(self, x_NHD: Tensor, batch: int, length: int) -> Tensor:
        """The rows where they were, `(B, T, H, D)`, with zeros where padding was."""
        if self.row_N is not None:
            x_NHD = x_NHD.new_zeros(batch * length, *x_NHD.shape[1:]).index_copy(0, self.row_N, x_NHD)
        return torch.unflatten(x_NHD, 0, (batch, length))


def skip(position_BT: Tensor) -> bool:
    """Whether positions go on otherwise than by one where they do not start again. Waits for the device."""
    return bool(((position_BT.diff() != 1) & (position_BT[:, 1:] != 0)).any())


def _starts(lengths_C: Tensor) -> Tensor:
    return F.pad(lengths_C.cumsum(0, dtype=torch.int32), (1, 0))


def _power_of_four(least: int) -> int:
    """The first that is not less."""
    power = 1
    while power < least:
        power *= 4
    return power
