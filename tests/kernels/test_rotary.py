"""The kernel that rotates queries and keys, against torch's own operations, forward and backward."""

import pytest
import torch
from torch import Tensor

from expertune.attention.rotary import Rotation, formula, rotate
from tests.cases import DEVICE, KERNEL_DTYPES, later, needs_kernels
from tests.numerics import assert_no_worse

pytestmark = needs_kernels
HALVES = Rotation(interleaved=False, shared=False, half_width=False, passes=False)
ROTATIONS = {
    "halves": HALVES,
    "one angle": HALVES._replace(shared=True),
    "half width": HALVES._replace(half_width=True),
    "interleaved": HALVES._replace(interleaved=True, shared=True),
    "partial": HALVES._replace(passes=True),
}
SIZES = [((4, 2), 8), ((3, 1), 6), ((5, 5), 1)]  # heads and pairs


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(rotation: Rotation, heads: tuple[int, int], pairs: int, layout: str, is_one_batch: bool) -> list[Tensor]:
    """Queries and keys as attentions have them: heads beside each other, or a part of each, or one for all."""
    rest = 6 if rotation.passes else 0
    q, k = (draw(i, 2, 5, n, 2 * pairs + rest).transpose(1, 2) for i, n in enumerate(heads))
    if layout == "parts":
        q, k = (torch.cat((x, x + 1), dim=-1)[..., : x.shape[-1]] for x in (q, k))
    elif layout == "plain":
        q, k = q.contiguous(), k.contiguous()
    width = pairs if rotation.half_width else 2 * pairs
    return [q, k, *[draw(i, 1 if is_one_batch else 2, 5, width) for i in (2, 3)]]


def results(function: str, tensors: list[Tensor], rotation: Rotation) -> list[Tensor]:
    """Both outputs and both gradients."""
    q, k, cos, sin = tensors
    q, k = (x.detach().requires_grad_() for x in (q, k))
    outs = rotate(q, k, cos, sin, rotation) if function == "ours" else [formula(x, cos, sin, rotation) for x in (q, k)]
    douts = [draw(i, *x.shape).to(x) for i, x in enumerate(outs, start=7)]
    return [*[x.detach() for x in outs], *torch.autograd.grad(outs, (q, k), douts)]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "heads", "pairs"),
    [
        # how heads lie does not change how many a program turns
        pytest.param(layout, *sizes, marks=later(layout != "parts" and sizes != SIZES[0]), id=f"{layout}-{sizes}")
        for layout in ("heads", "parts", "plain")
        for sizes in SIZES
    ],
)
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())
def test_it_is_no_worse_than_torch(
    rotation: Rotation, heads: tuple[int, int], pairs: int, layout: str, dtype: torch.dtype
) -> None:
    tensors = [x.to(DEVICE) for x in inputs(rotation, heads, pairs, layout, is_one_batch=layout == "heads")]
    narrow = [x.to(dtype) for x in tensors]
    truth = results("formula", [x.double() for x in narrow], rotation)
    ours, plain = (results(name, narrow, rotation) for name in ("ours", "formula"))
    for name, mine, theirs, exact in zip(("q", "k", "dq", "dk"), ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, theirs, exact, name)


def test_nothing_is_nothing() -> None:
    q, k, cos, sin = (x.to(DEVICE, torch.float32)[:, :, :0] for x in inputs(HALVES, (2, 1), 4, "plain", False)[:2] * 2)
    outs = rotate(q, k, cos[:, 0], sin[:, 0], HALVES)
    assert [out.shape for out in outs] == [q.shape, k.shape]


def test_the_layout_of_heads_is_kept() -> None:
    """So that the attention gets what it would have got, without a copy."""
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(HALVES, (4, 2), 8, "heads", True)]
    q, _ = rotate(*tensors, HALVES)
    assert q.stride() == tensors[0].stride()


def far_apart(*heads: Tensor) -> Tensor:
    """The same heads `(T, D)` as `(1, H, T, D)`, the last of three more than 2³¹ elements behind the first."""
    gap = 2**30 + 8
    memory = torch.empty((len(heads) - 1) * gap + heads[0].numel(), dtype=heads[0].dtype, device=heads[0].device)
    x = memory.as_strided((1, len(heads), *heads[0].shape), (1, gap, heads[0].shape[1], 1))
    for i, head in enumerate(heads):
        x[0, i] = head
    return x


def test_heads_may_lie_far_apart() -> None:
    """As gradients of long samples do, whose heads are whole ones of all tokens."""
    q, k = (draw(i, 3, 2, 8).to(DEVICE, KERNEL_DTYPES[-1]) for i in range(2))
    cos, sin = (draw(i, 1, 2, 8).to(q) for i in (2, 3))
    near, far = (rotate(each, k[None], cos, sin, HALVES)[0] for each in (q[None], far_apart(*q)))
    assert torch.equal(near, far)
