"""Attention to whole samples with heads of 256 on Hopper: cuDNN's forward and our backward.

cuDNN's backward of such heads reaches 390 TFLOP/s on an H200, where its forward reaches 640; ours (`backward.py`) is
1.1 to 1.6 times as fast, the more the longer the context.
"""

from torch import Tensor

from expertune.attention.cudnn import Cudnn
from expertune.attention.kernels import Attended, Pattern
from expertune.kernels import has_triton

_WIDTH = 256  # of heads, for which our kernels are made


class Hopper(Cudnn):
    """cuDNN's forward, and a backward in two rounds without atomics."""

    name = "hopper"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here."""
        if q_BHTD.shape[-1] != _WIDTH or v_BJSV.shape[-1] != _WIDTH:
            return f"needs heads of {_WIDTH}, also of values"
        if (reason := super().why_not(q_BHTD, v_BJSV, pattern)) is not None:
            return reason
        if not has_triton():
            return "needs Triton, which is not installed"
        from expertune.kernels.attention_hopper import KEYS  # imports Triton, which is optional
        from expertune.kernels.device import is_hopper, num_programs
        from expertune.kernels.launch import ceil_div

        if not is_hopper(q_BHTD.device):
            return "is made for compute capability 9.0"
        num_blocks = q_BHTD.shape[1] * ceil_div(q_BHTD.shape[2], KEYS)
        if 4 * num_blocks < 3 * num_programs(q_BHTD.device):
            return f"keeps the card busy with more blocks of {KEYS} keys than {num_blocks}"
        return None

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        from expertune.attention.backward import backward

        return backward(dout_BTHV, q_BHTD, k_BJSD, v_BJSV, attended.out_BTHV, attended.lse_BHT, pattern.scale)
