"""Attention's forward over spans of keys, with sinks or without: whole and packed samples, and windows."""

import torch
from torch import Tensor

from expertune.kernels import attention_forward as plain
from expertune.kernels import attention_forward_hopper
from expertune.kernels.attention_hopper import readable
from expertune.kernels.attention_spans import Spans, empty_rows
from expertune.kernels.device import is_hopper


def forward(
    q_BHTD: Tensor,
    k_BJTD: Tensor,
    v_BJTV: Tensor,
    scale: float,
    spans: Spans,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What attention gives, `(B, T, H, V)`, and the logarithm of the sum of each query's exponentials, `(B, H, T)`.

    Args:
        q_BHTD, k_BJTD, v_BJTV: what attends; `H / J` heads of queries share a key.
        scale: of scores.
        spans: of the rows of each sample; packed ones are one row of a batch.
        sinks_H: see `attend.py`.
    """
    batch, num_heads, length, _ = q_BHTD.shape
    out_BTHV = q_BHTD.new_empty((batch, length, num_heads, v_BJTV.shape[-1]))
    lse_BHT = empty_rows(batch, num_heads, length, dtype=torch.float32, device=q_BHTD.device)
    attend = attention_forward_hopper.forward if is_hopper(q_BHTD.device) else plain.forward
    q, k, v = (readable(x.transpose(1, 2)) for x in (q_BHTD, k_BJTD, v_BJTV))
    sinks_H = None if sinks_H is None else sinks_H.contiguous()
    for each in range(batch):
        attend(q[each], k[each], v[each], spans, out_BTHV[each], lse_BHT[each], scale, sinks_H)
    return out_BTHV, lse_BHT
