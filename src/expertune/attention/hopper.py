"""Attention on Hopper by our kernels: with heads of 64, 128 and 256, and of 192 over values of 128.

Of packed samples and windows torch has FlashAttention-2 alone, with 290 TFLOP/s forward and 230 backward of heads of
256 on an H200. Of whole samples cuDNN has a backward of 390 for these, where its forward reaches 640; with narrow heads
it is as fast as ours, unless there are sinks, which ours adds to the softmax itself.
"""

from torch import Tensor

from expertune.attention.flash import why_not_fused
from expertune.attention.kernels import Attended, Pattern
from expertune.kernels import has_triton

# tokens of whole samples with narrow heads and sinks, up to which ours is faster: what cuDNN writes is scaled after it,
# but its backward is faster. Forward and backward of 64 heads of 64 over 8, ours by it, on an H200: 0.88 at 1,024
# tokens, 0.92 at 2,048, 0.97 at 4,096, which no step shows, and 1.05 at 8,192.
MOST_WITH_SINKS = 2048
# widths of heads and of their values, for which our kernels are made
_NARROW, _WIDE = ((64, 64), (128, 128)), ((192, 128), (256, 256))


class Hopper:
    """A forward over spans of keys, and a backward without atomics."""

    name = "hopper"

    def why_not(self, q_BHTD: Tensor, v_BJSV: Tensor, pattern: Pattern) -> str | None:
        """Why it cannot run here."""
        widths = _widths(q_BHTD, v_BJSV)
        if widths not in (*_NARROW, *_WIDE):
            return f"needs heads of 64, 128 or 256, or of 192 over values of 128, got {widths[0]} over {widths[1]}"
        if widths in _NARROW and pattern.window is None and pattern.sequences is None:
            if not pattern.has_sinks:
                return f"leaves whole samples with heads of {widths[0]} to others, which are as fast"
            if q_BHTD.shape[2] > MOST_WITH_SINKS:
                return f"leaves whole samples of more than {MOST_WITH_SINKS:,} tokens to others, which are faster"
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

    def forward(
        self, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, pattern: Pattern, sinks_H: Tensor | None = None
    ) -> Attended:
        """Attend."""
        from expertune.attention.forward import forward
        from expertune.kernels.attention_spans import spans

        start_C = None if pattern.sequences is None else pattern.sequences.start_C
        of_rows = spans(q_BHTD.shape[2], _most(q_BHTD, pattern), start_C, q_BHTD.device)
        out_BTHV, lse_BHT = forward(q_BHTD, k_BJSD, v_BJSV, pattern.scale, of_rows, sinks_H)
        return Attended(out_BTHV, lse_BHT, of_rows[1:])

    def backward(
        self, dout_BTHV: Tensor, q_BHTD: Tensor, k_BJSD: Tensor, v_BJSV: Tensor, attended: Attended, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""
        from expertune.attention.backward import backward
        from expertune.kernels.attention_spans import Spans

        out_BTHV, lse_BHT, found = attended
        of_rows = Spans(_most(q_BHTD, pattern), *found)
        given = (dout_BTHV, q_BHTD, k_BJSD, v_BJSV, out_BTHV, lse_BHT)
        return backward(
            *given,
            pattern.scale,
            of_rows,
            forms_again=_widths(q_BHTD, v_BJSV) in _NARROW,
            is_whole=pattern.sequences is None and pattern.window is None,
            overwrites=pattern.overwrites,
            overwrites_gradient=pattern.overwrites_gradient,
        )


def _widths(q_BHTD: Tensor, v_BJSV: Tensor) -> tuple[int, int]:
    return q_BHTD.shape[-1], v_BJSV.shape[-1]


def _most(q_BHTD: Tensor, pattern: Pattern) -> int:
    """Keys that a query attends to at most."""
    longest = q_BHTD.shape[2] if pattern.sequences is None else pattern.sequences.longest
    return min(q_BHTD.shape[2], longest, pattern.window or longest)
