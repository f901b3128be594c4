"""Cases of attention's backward, the formula written out, and how ours is compared with it."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.cases import DEVICE
from tests.numerics import assert_no_worse

NAMES = ("dq", "dk", "dv")


class Width(NamedTuple):
    """Of heads, and of their values."""

    keys: int
    values: int


LATENT = Width(192, 128)  # of DeepSeek


def inputs(
    batch: int, length: int, num_heads: int, num_shared: int, width: int | Width, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values, a gradient, `(B, heads, T, D or V)`; values lie behind others, as projections write."""
    draw = torch.Generator().manual_seed(0)
    D, V = width if isinstance(width, Width) else (width, width)
    shapes = [(num_heads, D), (num_shared, D), (num_shared, V + 16), (num_heads, V)]
    made = [torch.randn((batch, length, *shape), generator=draw).to(DEVICE, dtype) for shape in shapes]
    return [x[..., -wanted:].transpose(1, 2) for x, wanted in zip(made, (D, D, V, V), strict=True)]


class Case(NamedTuple):
    """Samples that lie one after the other, None for one, and the keys that a query attends to at most."""

    lengths: tuple[int, ...] | None = None
    window: int | None = None

    def hidden(self, length: int) -> Tensor:
        """Which scores do not count, `(T, T)`."""
        place = torch.arange(length)
        behind = place[:, None] - place[None, :]
        hidden = (behind < 0) | (behind >= (self.window or length))
        if self.lengths is not None:
            sample = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
            hidden |= sample[:, None] != sample[None, :]
        return hidden.to(DEVICE)

    def spans(self, length: int) -> Any:
        """The same as the kernels take it, with the longest sample rounded up as a step does."""
        from expertune.kernels.attention_spans import spans

        most = min(self.window or length, length if self.lengths is None else max(self.lengths) + 3)
        starts = None
        if self.lengths is not None:
            starts = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
        return spans(length, most, starts, DEVICE)


WHOLE = Case()


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, case: Case, sinks_H: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of the sum of each query's exponentials."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(case.hidden(q.shape[2]), -math.inf)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.to(q)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v, scores.logsumexp(-1)


def gradients(tensors: list[Tensor], scale: float, case: Case) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    return list(torch.autograd.grad(formula(q, k, v, scale, case)[0], (q, k, v), tensors[3]))


def ours(
    tensors: list[Tensor],
    scale: float,
    case: Case = WHOLE,
    *,
    forms_again: bool = False,
    **more: bool,
) -> list[Tensor]:
    from expertune.attention.backward import backward

    q, k, v, dout = tensors
    out, lse = formula(q.double(), k.double(), v.double(), scale, case)
    spans = case.spans(q.shape[2])
    given = (dout.transpose(1, 2), q, k, v, out.to(q).transpose(1, 2), lse.float(), scale, spans)
    return list(backward(*given, forms_again=forms_again, **more))


def check(tensors: list[Tensor], scale: float, case: Case = WHOLE, **how: bool) -> list[Tensor]:
    mine, plain = ours(tensors, scale, case, **how), gradients(tensors, scale, case)
    truth = gradients([x.double() for x in tensors], scale, case)
    for name, got, other, exact in zip(NAMES, mine, plain, truth, strict=True):
        assert got.dtype == tensors[0].dtype
        assert got.shape == exact.shape
        assert_no_worse(got, other, exact, name)
    return mine


BOUNDS = {"whole": 2**30, "some heads or queries": 31_000, "one block": 1}


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def check_on_hopper(tensors: list[Tensor], case: Case = WHOLE, *, is_whole: bool = False) -> None:
    """The kernels for heads of that width; two runs give the same bits, the second where the tensors were."""
    width = tensors[0].shape[-1]
    forms_again = width < 192
    first = check(tensors, width**-0.5, case, forms_again=forms_again, is_whole=is_whole)
    again = ours(tensors, width**-0.5, case, forms_again=forms_again, is_whole=is_whole, overwrites=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
