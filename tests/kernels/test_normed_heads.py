"""The kernels that norm heads and turn them, against torch's own operations, forward and backward."""

import pytest
import torch
from torch import Tensor

from expertune.attention.normed_heads import _NormAndRotate
from expertune.attention.rotary import Rotation, formula
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.kernels.test_rms_norm import plain
from tests.kernels.test_rotary import ROTATIONS, draw, far_apart
from tests.numerics import assert_no_worse

pytestmark = needs_kernels
EPS = 1e-2


def inputs(rotation: Rotation, heads: int, pairs: int, is_one_batch: bool) -> list[Tensor]:
    rest = 6 if rotation.passes else 0
    x, weight = draw(0, 2, 5, heads, 2 * pairs + rest), draw(1, 2 * pairs + rest)
    width = pairs if rotation.half_width else 2 * pairs
    return [x, weight, *[draw(i, 1 if is_one_batch else 2, 5, width) for i in (2, 3)]]


def by_torch(x: Tensor, weight: Tensor, offset: float, cos: Tensor, sin: Tensor, rotation: Rotation) -> list[Tensor]:
    y = plain(x, weight, EPS, offset)
    return [y, formula(y.transpose(1, 2), cos, sin, rotation).transpose(1, 2)]


def results(function: str, tensors: list[Tensor], offset: float, rotation: Rotation, of: str) -> list[Tensor]:
    """Both outputs, and the gradient of the input from those that are asked for."""
    x, weight, cos, sin = tensors
    x = x.detach().requires_grad_()
    outs = (
        _NormAndRotate.apply(x, weight, EPS, offset, cos, sin, rotation)
        if function == "ours"
        else by_torch(x, weight, offset, cos, sin, rotation)
    )
    asked = [out for out, name in zip(outs, ("norms", "turned"), strict=True) if name in of]
    douts = [draw(7 + i, *x.shape).to(x).transpose(1, 2).contiguous().transpose(1, 2) for i in range(len(asked))]
    return [*[out.detach() for out in outs], *torch.autograd.grad(asked, x, douts)]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "pairs"), [(4, 8), (3, 6), (1, 1), (5, 500)])
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())
def test_it_is_no_worse_than_torch(rotation: Rotation, heads: int, pairs: int, dtype: torch.dtype) -> None:
    offset = 1.0 if heads == 3 else 0.0
    narrow = [x.to(DEVICE, dtype) for x in inputs(rotation, heads, pairs, is_one_batch=heads == 4)]
    exact = [x.double() for x in narrow]
    for of in ("turned", "norms", "norms and turned"):
        ours, theirs = (results(name, narrow, offset, rotation, of) for name in ("ours", "torch"))
        truth = results("torch", exact, offset, rotation, of)
        for name, mine, other, right in zip(("y", "turned", "dx"), ours, theirs, truth, strict=True):
            assert mine.dtype == dtype
            assert_no_worse(mine, other, right, f"{name} of {of}")


def test_a_weight_of_another_dtype() -> None:
    rotation, dtype = ROTATIONS["halves"], KERNEL_DTYPES[-1]
    x, weight, cos, sin = (x.to(DEVICE, dtype) for x in inputs(rotation, 2, 4, is_one_batch=True))
    tensors = [x, weight.float(), cos, sin]
    ours, theirs = (results(name, tensors, 1.0, rotation, "turned") for name in ("ours", "torch"))
    truth = results("torch", [each.double() for each in tensors], 1.0, rotation, "turned")
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        assert_no_worse(mine, other, right)


def test_gradients_that_are_one_number() -> None:
    """As those of a sum, whose strides are zero."""
    rotation = ROTATIONS["halves"]
    x, weight, cos, sin = (x.to(DEVICE, torch.float32) for x in inputs(rotation, 2, 4, is_one_batch=True))
    x = x.requires_grad_()
    for place in range(2):
        ours = _NormAndRotate.apply(x, weight, EPS, 0.0, cos, sin, rotation)[place].sum()
        theirs = by_torch(x, weight, 0.0, cos, sin, rotation)[place].sum()
        torch.testing.assert_close(*(torch.autograd.grad(total, x)[0] for total in (ours, theirs)))


def test_no_tokens() -> None:
    rotation = ROTATIONS["halves"]
    x, weight, cos, sin = (x.to(DEVICE, KERNEL_DTYPES[0]) for x in inputs(rotation, 2, 4, is_one_batch=True))
    x = x[:, :0].requires_grad_()
    y, turned = _NormAndRotate.apply(x, weight, EPS, 0.0, cos[:, :0], sin[:, :0], rotation)
    (dx,) = torch.autograd.grad([y, turned], x, [y, turned])
    assert y.shape == turned.shape == dx.shape == x.shape


def test_a_later_batch_of_another_length_finds_its_kernel() -> None:
    """Lengths are not compiled in."""
    rotation = ROTATIONS["halves"]
    for length in (16, 5, 1):
        x, cos, sin = (
            draw(i, 1, length, *shape).to(DEVICE, torch.float32) for i, shape in enumerate([(4, 8), (8,), (8,)])
        )
        weight = torch.ones(8, device=DEVICE)
        y, turned = _NormAndRotate.apply(x, weight, EPS, 0.0, cos, sin, rotation)
        for mine, other in zip((y, turned), by_torch(x, weight, 0.0, cos, sin, rotation), strict=True):
            torch.testing.assert_close(mine, other)


def test_gradients_of_heads_may_lie_far_apart() -> None:
    rotation = ROTATIONS["halves"]
    x, weight, cos, sin = (x.to(DEVICE, KERNEL_DTYPES[-1]) for x in inputs(rotation, 3, 4, is_one_batch=True))
    x = x[:1].requires_grad_()
    _, turned = _NormAndRotate.apply(x, weight, EPS, 0.0, cos, sin, rotation)
    dout = draw(5, 3, 5, 8).to(turned)
    near, far = (
        torch.autograd.grad(turned, x, each.transpose(1, 2), retain_graph=True)[0]
        for each in (dout[None], far_apart(*dout))
    )
    assert torch.equal(near, far)
