"""Attention with heads of 256 on Hopper: a library's forward and our backward.

Of whole samples cuDNN's forward, whose backward of such heads reaches 390 TFLOP/s on an H200 where its forward reaches
640; of packed samples and windows FlashAttention-2's. Ours (`backward.py`) is faster than either's.
"""

from torch import Tensor

from expertune.attention.cudnn import Cudnn
from expertune.attention.flash import Flash, why_not_fused
from expertune.attention.kernels import Attended, Kernel, Pattern
from expertune.kernels import has_triton

_WIDTH = 256  # of heads, for which our kernels are made


class Hopper:
    """cuDNN's forward, or FlashAttention-2's where cuDNN has none, and a backward in two rounds without atomics."""

    name = "hopper"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here."""
        if q_BHTD.shape[-1] != _WIDTH or v_BJSV.shape[-1] != _WIDTH:
            return f"needs heads of {_WIDTH}, also of values"
        if (reason := why_not_fused(q_BHTD, v_BJSV, pattern, (9, 0))) is not None:
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

    def forward(self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> Attended:
        """Attend."""
        from expertune.kernels.attention_spans import spans

        kernel: Kernel = Cudnn() if pattern.window is None and pattern.sequences is None else Flash()
        out_BTHV, lse_BHT, _ = kernel.forward(q_BHTD, k_BJSD, v_BJSV, pattern)
        start_C = None if pattern.sequences is None else pattern.sequences.start_C
        _, *found = spans(q_BHTD.shape[2], _most(q_BHTD, pattern), start_C, q_BHTD.device)
        return Attended(out_BTHV, lse_BHT, tuple(found))

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        from expertune.attention.backward import backward
        from expertune.kernels.attention_spans import Spans

        out_BTHV, lse_BHT, found = attended
        of_rows = Spans(_most(q_BHTD, pattern), *found)
        return backward(dout_BTHV, q_BHTD, k_BJSD, v_BJSV, out_BTHV, lse_BHT, pattern.scale, of_rows)


def _most(q_BHTD: Tensor, pattern: Pattern) -> int:
    """Keys that a query attends to at most."""
    longest = q_BHTD.shape[2] if pattern.sequences is None else pattern.sequences.longest
    return min(q_BHTD.shape[2], longest, pattern.window or longest)
