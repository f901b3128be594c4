"""cuDNN's attention as torch ships it: on Hopper about 1.5 times as fast as FlashAttention-2, without windows."""

import torch
from torch import Tensor

from expertune.attention.flash import why_not_fused
from expertune.attention.kernels import Attended, Pattern
from expertune.attention.sinks import with_sinks


class Cudnn:
    """`aten::_scaled_dot_product_cudnn_attention` and its backward."""

    name = "cudnn"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here."""
        if (reason := why_not_fused(q_BHTD, v_BJSV, pattern, (9, 0))) is not None:
            return reason
        if pattern.sequences is not None:
            return "takes no packed sequences"
        if pattern.window is not None:
            return "takes no sliding window"
        return None

    def forward(
        self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern, sinks_H: Tensor | None = None
    ) -> Attended:
        """Attend."""
        out, lse, _, _, _, _, *seed, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BHTD, k_BJSD, v_BJSV, None, True, 0.0, True, False, scale=pattern.scale
        )
        return with_sinks(Attended(out.transpose(1, 2), lse.view(q_BHTD.shape[:3]), tuple(seed)), sinks_H)

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        dout, out = (x.contiguous().transpose(1, 2) for x in (dout_BTHV, attended.out_BTHV))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout,
            q_BHTD,
            k_BJSD,
            v_BJSV,
            out,
            attended.lse_BHT.contiguous()[..., None],
            *attended.state,
            None,  # bias
            None,  # lengths of queries
            None,  # lengths of keys
            q_BHTD.shape[2],
            k_BJSD.shape[2],
            0.0,
            True,
            scale=pattern.scale,
        )
        return dq, dk, dv
