"""Attention in plain torch, a tile of queries at a time: any device, dtype and mask, and the truth of the others."""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertune.attention.kernels import Attended, Pattern

_SCORES = 2**25  # of a tile, over all heads


class Tiles:
    """Scores of a tile of queries are formed in float32 (float64 for float64), and again in backward."""

    name = "tiles"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """It always runs."""
        return None

    def forward(
        self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern, sinks_H: Tensor | None = None
    ) -> Attended:
        """Attend."""
        batch, heads, length, _ = q_BHTD.shape
        q_BJGTD = _by_key_head(q_BHTD, k_BJSD)
        out_BJGTV = q_BHTD.new_empty(*q_BJGTD.shape[:-1], v_BJSV.shape[-1])
        lse_BJGT = q_BHTD.new_empty(q_BJGTD.shape[:-1], dtype=_sum_dtype(q_BHTD))
        for rows, keys in _tiles(q_BHTD, k_BJSD, pattern):
            scores = _scores(q_BJGTD, k_BJSD, pattern, rows, keys)
            lse = scores.logsumexp(-1)
            if sinks_H is not None:
                lse = torch.logaddexp(lse, sinks_H.to(lse.dtype).view(1, *lse.shape[1:3], 1))
            lse_BJGT[..., rows] = lse
            out_BJGTV[..., rows, :] = _probabilities(scores, lse).to(v_BJSV.dtype) @ v_BJSV[:, :, None, keys]
        out_BTHV = out_BJGTV.flatten(1, 2).transpose(1, 2)
        return Attended(out_BTHV.contiguous(), lse_BJGT.view(batch, heads, length))

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        total = _sum_dtype(q_BHTD)
        q_BJGTD = _by_key_head(q_BHTD, k_BJSD)
        dout_BJGTV = _by_key_head(dout_BTHV.transpose(1, 2), k_BJSD)
        lse_BJGT = _by_key_head(attended.lse_BHT, k_BJSD)
        dq_BJGTD = torch.empty_like(q_BJGTD, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros_like(x, dtype=total) for x in (k_BJSD, v_BJSV))
        for rows, keys in _tiles(q_BHTD, k_BJSD, pattern):
            q, dout = q_BJGTD[..., rows, :], dout_BJGTV[..., rows, :]
            p = _probabilities(_scores(q_BJGTD, k_BJSD, pattern, rows, keys), lse_BJGT[..., rows])
            dp = _wide_product(dout, v_BJSV[:, :, None, keys].mT)
            # a row's own sum and not `⟨dout, out⟩`: rounding of `dp` then cancels
            ds = (p * (dp - torch.linalg.vecdot(p, dp)[..., None]) * pattern.scale).to(q.dtype)
            dq_BJGTD[..., rows, :] = ds @ k_BJSD[:, :, None, keys]
            dk[:, :, keys] += (ds.mT @ q).sum(2, dtype=total)
            dv[:, :, keys] += (p.to(dout.dtype).mT @ dout).sum(2, dtype=total)
        return dq_BJGTD.flatten(1, 2), dk.to(k_BJSD.dtype), dv.to(v_BJSV.dtype)


def _by_key_head(x_BH: Tensor, k_BJSD: Tensor) -> Tensor:
    """`(B, H, …)` as `(B, J, H/J, …)`."""
    return torch.unflatten(x_BH, 1, (k_BJSD.shape[1], -1))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y` in the dtype of sums: in 16 bits a product of large numbers would be rounded, or be infinite."""
    return x.to(_sum_dtype(x)) @ y.to(_sum_dtype(y))


def _tiles(q_BHTD: Tensor, k_BJSD: Tensor, pattern: Pattern) -> Iterator[tuple[slice, slice]]:
    """Tiles of queries, each with the keys that any of them may attend to."""
    batch, heads, length, _ = q_BHTD.shape
    num_keys = k_BJSD.shape[2]
    if torch.compiler.is_compiling():  # a loop would be traced anew for every length
        yield slice(0, length), slice(0, num_keys)
        return
    step = max(16, _SCORES // max(1, batch * heads * num_keys))
    for start in range(0, length, step):
        stop = min(start + step, length)
        if pattern.mask is not None:
            yield slice(start, stop), slice(0, num_keys)
        else:
            yield slice(start, stop), slice(max(0, start + 1 - (pattern.window or start + 1)), stop)


def _scores(q_BJGTD: Tensor, k_BJSD: Tensor, pattern: Pattern, rows: slice, keys: slice) -> Tensor:
    """Scaled scores of a tile, `-inf` where a query does not attend."""
    scores = _wide_product(q_BJGTD[..., rows, :], k_BJSD[:, :, None, keys].mT) * pattern.scale
    if pattern.mask is not None:
        mask = pattern.mask[:, :, rows, keys]
        mask = mask[:, :, None] if mask.shape[1] == 1 else _by_key_head(mask, k_BJSD)
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    row, key = (torch.arange(s.start, s.stop, device=scores.device) for s in (rows, keys))
    before = row[:, None] - key
    attends = before >= 0
    if pattern.window is not None:
        attends &= before < pattern.window
    if pattern.sequences is not None:
        attends &= pattern.sequences.of_rows(row)[:, None] == pattern.sequences.of_rows(key)
    return scores.masked_fill(~attends, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Zero in the row of a query that attends to nothing, whose log-sum-exp is `-inf`."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
