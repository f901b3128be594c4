"""FlashAttention-2 as torch ships it: sliding windows and packed sequences, on NVIDIA cards from Ampere on.

torch's public function knows windows and packed sequences, but neither yields nor takes the log-sum-exp, which sinks
need; so these are the operators below it.
"""

from typing import Any

import torch
from torch import Tensor

from expertune.attention.kernels import Attended, Pattern
from expertune.attention.sinks import with_sinks

_WIDEST = 256  # head, of any


class Flash:
    """`aten::_flash_attention_forward` and its backward."""

    name = "flash"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here."""
        return why_not_fused(q_BHTD, v_BJSV, pattern, (8, 0))

    def forward(
        self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern, sinks_H: Tensor | None = None
    ) -> Attended:
        """Attend."""
        width = v_BJSV.shape[-1]
        q, k, v = (_rows(x, pattern) for x in (q_BHTD, k_BJSD, padded(v_BJSV, q_BHTD)))
        out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_lengths(q, pattern), 0.0, True, False, **_scale_and_window(pattern)
        )
        if pattern.sequences is not None:
            out, lse = out[None], lse[None]
        return with_sinks(Attended(out[..., :width], lse, tuple(state)), sinks_H)

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        out, lse = attended.out_BTHV, attended.lse_BHT
        q, k, v = (_rows(x, pattern) for x in (q_BHTD, k_BJSD, padded(v_BJSV, q_BHTD)))
        dout, out = padded(dout_BTHV, q_BHTD).contiguous(), padded(out, q_BHTD).contiguous()
        if pattern.sequences is not None:
            dout, out, lse = dout[0], out[0], lse[0]
        grads = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            *_lengths(q, pattern),
            0.0,
            True,
            *attended.state,
            **_scale_and_window(pattern),
        )
        dq, dk, dv = ((g if pattern.sequences is None else g[None]).transpose(1, 2) for g in grads)
        return dq, dk, dv[..., : v_BJSV.shape[-1]]


def why_not_fused(q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern, capability: tuple[int, int]) -> str | None:
    """What torch's fused kernels have in common."""
    if q_BHTD.device.type != "cuda":
        return f"needs a CUDA device, these tensors are on {q_BHTD.device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(q_BHTD.device) < capability:
        return f"needs an NVIDIA card of compute capability {capability[0]}.{capability[1]}"
    if q_BHTD.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {q_BHTD.dtype}"
    if q_BHTD.shape[-1] > _WIDEST or q_BHTD.shape[-1] % 8:
        return f"needs heads of at most {_WIDEST}, a multiple of 8, got {q_BHTD.shape[-1]}"
    if v_BJSV.shape[-1] > q_BHTD.shape[-1]:
        return f"needs values no wider than queries, got {v_BJSV.shape[-1]} and {q_BHTD.shape[-1]}"
    if pattern.mask is not None:
        return "takes no mask"
    if torch.compiler.is_compiling():
        return "is not traced by torch.compile"
    return None


def padded(x: Tensor, q_BHTD: Tensor) -> Tensor:
    """With zeros up to the width of the queries: a kernel knows one width."""
    missing = q_BHTD.shape[-1] - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _rows(x_BHTD: Tensor, pattern: Pattern) -> Tensor:
    """`(B, T, H, D)`, or of packed sequences `(N, H, D)`."""
    x_BTHD = x_BHTD.transpose(1, 2)
    return x_BTHD if pattern.sequences is None else x_BTHD[0]


def _lengths(q: Tensor, pattern: Pattern) -> tuple[Tensor | None, Tensor | None, int, int]:
    if pattern.sequences is None:
        return None, None, q.shape[1], q.shape[1]
    start_C, longest = pattern.sequences.start_C, pattern.sequences.longest
    return start_C, start_C, longest, longest


def _scale_and_window(pattern: Pattern) -> dict[str, Any]:
    if pattern.window is None:
        return {"scale": pattern.scale}
    return {"scale": pattern.scale, "window_size_left": pattern.window - 1, "window_size_right": 0}
