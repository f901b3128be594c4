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
_SIDE = 8  # of them that a thread reads


@triton.jit
def _cap(logits, factor, height, slope, HAS_CAP: tl.constexpr):
    """z, and ∂z / ∂logits, of which `slope` is the steepest."""
    if HAS_CAP:
        tanh = 2 * tl.sigmoid(2 * (logits * factor)) - 1
        return height * tanh, slope * (1 - tanh * tanh)
    else:  # noqa: RET505  the compiler would see this return too
        return logits * factor, slope


@triton.jit
def _read(row_ptr, v, V, IS_INSIDE: tl.constexpr, POLICY: tl.constexpr):
    if IS_INSIDE:
        return tl.load(row_ptr + v, eviction_policy=POLICY).to(tl.float32)
    return tl.load(row_ptr + v, mask=v < V, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _fold(
    sums, row_ptr, start, V, label, factor, height, slope,
    HAS_CAP: tl.constexpr, BV: tl.constexpr, SIDE: tl.constexpr, IS_INSIDE: tl.constexpr,
):  # fmt: skip
    """Take `BV` logits into the sums; those that a thread reads side by side have sums of their own, without waiting.

    −1e30 stands for −∞, from which nothing can be taken away.
    """
    most, total, weighted, most_before = sums
    v = start + tl.arange(0, BV)
    z, _ = _cap(_read(row_ptr, v, V, IS_INSIDE, "evict_last"), factor, height, slope, HAS_CAP)
    if not IS_INSIDE:
        z = tl.where(v < V, z, -1e30)
    if (label >= start) & (label < start + BV):
        most_before = tl.maximum(tl.max(most, axis=0), tl.max(tl.where(v < label, z, -1e30), axis=0))
    z = tl.reshape(z, (BV // SIDE, SIDE))
    highest = tl.maximum(most, tl.max(z, axis=1))
    total, weighted = _lower(total, weighted, most - highest)
    below = z - highest[:, None]
    e = tl.exp(below)
    return highest, total + tl.sum(e, axis=1), weighted + tl.sum(e * below, axis=1), most_before


@triton.jit
def _lower(total, weighted, by):
    """Sums of e and of e · x, where all x = z − maximum change by `by` ≤ 0."""
    shrunk = tl.exp(by)
    return total * shrunk, (weighted + total * by) * shrunk


@triton.jit
def _replace(
    row_ptr, start, V, label, factor, height, slope, log_total,
    HAS_CAP: tl.constexpr, BV: tl.constexpr, IS_INSIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `BV` logits in their place."""
    v = start + tl.arange(0, BV)
    z, slope = _cap(_read(row_ptr, v, V, IS_INSIDE, "evict_first"), factor, height, slope, HAS_CAP)
    gradient = -tl.exp(z - log_total) * slope
    if (label >= start) & (label < start + BV):
        gradient += tl.where(v == label, slope, 0.0)
    if IS_INSIDE:
        tl.store(row_ptr + v, gradient.to(row_ptr.dtype.element_ty), eviction_policy="evict_first")
    else:
        tl.store(row_ptr + v, gradient.to(row_ptr.dtype.element_ty), mask=v < V, eviction_policy="evict_first")


@triton.jit
def _log_probs_kernel(
    logits_ptr, label_ptr, log_prob_ptr, entropy_ptr, is_top1_ptr, V, factor, height, slope,
    HAS_CAP: tl.constexpr, WRITES_GRADIENT: tl.constexpr, BV: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """One program a token, twice over its logits: first the sums, rescaled as the maximum grows, then the gradient.

    The second time from the end: what was read last is still in the cache.
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * V
    label = tl.load(label_ptr + token)
    inside = V // BV * BV  # columns in whole blocks
    most = tl.full((BV // SIDE,), -1e30, tl.float32)
    most_before = tl.full((), -1e30, tl.float32)  # of the columns before the label's: of two maxima the first counts
    total = tl.zeros((BV // SIDE,), tl.float32)
    weighted = tl.zeros((BV // SIDE,), tl.float32)
    for start in range(0, inside, BV):
        most, total, weighted, most_before = _fold(
            (most, total, weighted, most_before), row_ptr, start, V, label, factor, height, slope,
            HAS_CAP, BV, SIDE, True,
        )  # fmt: skip
    if inside < V:
        most, total, weighted, most_before = _fold(
            (most, total, weighted, most_before), row_ptr, inside, V, label, factor, height, slope,
            HAS_CAP, BV, SIDE, False,
        )  # fmt: skip
    highest = tl.max(most, axis=0)
    total, weighted = _lower(total, weighted, most - highest)
    total_of_all = tl.sum(total, axis=0)
    log_total = tl.log(total_of_all)  # beyond the maximum: no digits are lost where one logit has nearly all
    is_known = (label >= 0) & (label < V)
    z_label = tl.where(is_known, tl.load(row_ptr + label, mask=is_known, other=0.0).to(tl.float32), float("nan"))
    z_label, _ = _cap(z_label, factor, height, slope, HAS_CAP)
    tl.store(log_prob_ptr + token, z_label - highest - log_total)
    tl.store(entropy_ptr + token, log_total - tl.sum(weighted, axis=0) / total_of_all)
    tl.store(is_top1_ptr + token, (z_label >= highest) & (z_label > most_before))
    if WRITES_GRADIENT:
        if inside < V:
            _replace(row_ptr, inside, V, label, factor, height, slope, highest + log_total, HAS_CAP, BV, False)
        for done in range(BV, inside + BV, BV):
            _replace(row_ptr, inside - done, V, label, factor, height, slope, highest + log_total, HAS_CAP, BV, True)


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
        label_T: int64, each in 0 … V−1; of another the log-probability is not a number.
        outs: `log_prob_T` and `entropy_T` in float32, `is_top1_T` in bool: whether the label is the likeliest token.
        scale: of the logits.
        softcap: None for none.
        inv_t: 1 / temperature.
        writes_gradient: whether the gradient is wanted.
    """
    num_tokens, vocabulary = logits_TV.shape
    if num_tokens == 0:
        return
    height = (1.0 if softcap is None else softcap) * inv_t
    factor = scale * height if softcap is None else scale / softcap
    launch(
        _log_probs_kernel,
        (num_tokens, 1, 1),
        (logits_TV, label_T, *outs),
        (),
        (vocabulary, factor, height, scale * inv_t),
        {"HAS_CAP": softcap is not None, "WRITES_GRADIENT": writes_gradient, "BV": _COLUMNS, "SIDE": _SIDE},
        num_warps=8,
    )
