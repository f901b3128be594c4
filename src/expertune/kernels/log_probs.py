"""Log-probabilities of labels from logits, and the logits replaced by their gradient, in one kernel. Any Triton target.

z = inv_t · cap(scale · logits)      cap(y) = softcap · tanh(y / softcap), or y
log p = z[label] − log Σ exp z       entropy = log Σ exp z − Σ p · z
∂ log p / ∂ logits = (1[label] − p) · ∂z / ∂logits
"""

import triton
import triton.language as tl
from torch import Tensor

from expertune.kernels.launch import launch

_COLUMNS = 4096  # that a program reads at once


@triton.jit
def _cap(logits, scale, softcap, inv_t, HAS_CAP: tl.constexpr):
    """z, and ∂z / ∂logits."""
    y = logits * scale
    if HAS_CAP:
        tanh = 2 * tl.sigmoid(2 * y / softcap) - 1
        return softcap * tanh * inv_t, scale * inv_t * (1 - tanh * tanh)
    return y * inv_t, tl.full(y.shape, 1.0, tl.float32) * (scale * inv_t)


@triton.jit
def _log_probs_kernel(
    logits_ptr, label_ptr, log_prob_ptr, entropy_ptr, is_top1_ptr, V, scale, softcap, inv_t,
    HAS_CAP: tl.constexpr, WRITES_GRADIENT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a token, twice over its logits: first the sums, rescaled as the maximum grows, then the gradient."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * V
    label = tl.load(label_ptr + token)
    columns = tl.arange(0, BV)
    most = tl.full((), -float("inf"), tl.float32)
    most_before = most  # of the columns before the label's: of two equal maxima the first counts
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, V, BV):
        v = start + columns
        inside = v < V
        z, _ = _cap(tl.load(row_ptr + v, mask=inside, other=0.0).to(tl.float32), scale, softcap, inv_t, HAS_CAP)
        z = tl.where(inside, z, -float("inf"))
        highest = tl.maximum(most, tl.max(z, axis=0))
        most_before = tl.maximum(most_before, tl.max(tl.where(v < label, z, -float("inf")), axis=0))
        shrunk = tl.exp(most - highest)
        e = tl.exp(z - highest)
        total = total * shrunk + tl.sum(e, axis=0)
        weighted = weighted * shrunk + tl.sum(tl.where(inside, e * z, 0.0), axis=0)
        most = highest
    log_total = most + tl.log(total)
    z_label, _ = _cap(tl.load(row_ptr + label).to(tl.float32), scale, softcap, inv_t, HAS_CAP)
    tl.store(log_prob_ptr + token, z_label - log_total)
    tl.store(entropy_ptr + token, log_total - weighted / total)
    tl.store(is_top1_ptr + token, (z_label >= most) & (z_label > most_before))
    if WRITES_GRADIENT:
        for start in range(0, V, BV):
            v = start + columns
            inside = v < V
            logits = tl.load(row_ptr + v, mask=inside, other=0.0).to(tl.float32)
            z, slope = _cap(logits, scale, softcap, inv_t, HAS_CAP)
            gradient = (tl.where(v == label, 1.0, 0.0) - tl.exp(z - log_total)) * slope
            tl.store(row_ptr + v, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def log_probs(
    logits_TV: Tensor,
    label_T: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    softcap: float | None,
    inv_t: float,
    writes_gradient: bool,
) -> None:
    """Fill `outs`, and with `writes_gradient` overwrite the logits by ∂ log p / ∂ logits.

    Args:
        logits_TV: contiguous, any floating dtype.
        label_T: int64, each in 0 … V−1.
        outs: `log_prob_T` and `entropy_T` in float32, `is_top1_T` in bool: whether the label is the likeliest token.
        scale: of the logits.
        softcap: None for none.
        inv_t: 1 / temperature.
        writes_gradient: whether the gradient is wanted.
    """
    num_tokens, vocabulary = logits_TV.shape
    if num_tokens == 0:
        return
    launch(
        _log_probs_kernel,
        (num_tokens, 1, 1),
        (logits_TV, label_T, *outs),
        (),
        (vocabulary, scale, 1.0 if softcap is None else softcap, inv_t),
        {"HAS_CAP": softcap is not None, "WRITES_GRADIENT": writes_gradient, "BV": _COLUMNS},
        num_warps=8,
    )
