"""The kernels that put the heads of latent attention together and take them apart, against torch's own operations."""

import pytest
import torch
from torch import Tensor

from expertune.attention import latent
from expertune.attention.rotary import Rotation
from tests.cases import DEVICE, KERNEL_DTYPES, needs_kernels
from tests.kernels.test_rotary import far_apart
from tests.numerics import assert_no_worse

pytestmark = needs_kernels
HALVES = Rotation(interleaved=False, shared=False, half_width=False, passes=False)
ROTATIONS = {
    "halves": HALVES,
    "half width": HALVES._replace(half_width=True),
    "interleaved": HALVES._replace(interleaved=True, shared=True),
    "interleaved, half width, in float32": HALVES._replace(interleaved=True, half_width=True),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(rotation: Rotation, num_heads: int, widths: tuple[int, int, int], is_one_batch: bool) -> list[Tensor]:
    """As an attention's projections give them: the rotated part of keys lies beside the rest of one."""
    passed, pairs, value = widths
    rotated = pairs if rotation.half_width else 2 * pairs
    q, kv = draw(0, 2, 5, num_heads, passed + 2 * pairs), draw(1, 2, 5, num_heads, passed + value)
    angles = [draw(i, 1 if is_one_batch else 2, 5, rotated) for i in (3, 4)]
    return [q, kv, draw(2, 2, 5, 9 + 2 * pairs)[..., 9:], *angles]


def results(function: str, tensors: list[Tensor], rotation: Rotation) -> list[Tensor]:
    """Queries, keys and values, and all gradients."""
    q, kv, rot = (x.detach().requires_grad_() for x in tensors[:3])
    outs = getattr(latent, function)(q, kv, rot, *tensors[3:], rotation)
    douts = [draw(i, *x.shape).to(x) for i, x in enumerate(outs, start=7)]
    return [*[x.detach() for x in outs], *torch.autograd.grad(outs, (q, kv, rot), douts)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, too, which runs on the CPU."""
    monkeypatch.setattr(latent, "why_not", lambda *_: None)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "widths"), [(4, (8, 4, 8)), (3, (6, 1, 5)), (1, (0, 3, 16))], ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
def test_they_are_no_worse_than_torch(
    name: str, num_heads: int, widths: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rotation = ROTATIONS[name]
    tensors = [x.to(DEVICE) for x in inputs(rotation, num_heads, widths, is_one_batch=num_heads == 3)]
    of_angles = torch.float32 if "float32" in name else dtype
    narrow = [*[x.to(dtype) for x in tensors[:3]], *[x.to(of_angles) for x in tensors[3:]]]
    truth = results("assemble_in_torch", [x.double() for x in narrow], rotation)
    ours, plain = (results(name, narrow, rotation) for name in ("assemble", "assemble_in_torch"))
    names = ("q", "k", "v", "dq", "dkv", "drot")
    for what, mine, theirs, exact in zip(names, ours, plain, truth, strict=True):
        assert (mine.dtype, theirs.dtype) == (dtype, dtype)
        assert_no_worse(mine, theirs, exact, what)


def test_nothing_is_nothing() -> None:
    tensors = [x.to(DEVICE, torch.float32)[:, :0] for x in inputs(HALVES, 2, (4, 2, 4), is_one_batch=False)]
    assert [x.numel() for x in results("assemble", tensors, HALVES)] == [0] * 6


@pytest.mark.parametrize("name", ["assemble", "assemble_in_torch"])
def test_all_that_is_put_together_is_new(name: str) -> None:
    """So that nothing else is kept with it, and it may be written over."""
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(HALVES, 4, (8, 4, 8), is_one_batch=True)]
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *getattr(latent, name)(*tensors, HALVES))}
    assert len(storages) == len(tensors) + 3


def test_heads_of_a_token_lie_side_by_side() -> None:
    """So that the output of attention comes as the next projection reads it, and no gradient is copied."""
    tensors = [x.to(DEVICE, torch.float32) for x in inputs(HALVES, 4, (8, 4, 8), is_one_batch=True)]
    assert all(x.transpose(1, 2).is_contiguous() for x in latent.assemble(*tensors, HALVES))


def test_gradients_of_heads_may_lie_far_apart() -> None:
    q, kv, rot, cos, sin = (
        x.to(DEVICE, KERNEL_DTYPES[-1])[:1] for x in inputs(HALVES, 3, (6, 2, 4), is_one_batch=True)
    )
    q, kv = q.requires_grad_(), kv.requires_grad_()
    outs = latent.assemble(q, kv, rot, cos, sin, HALVES)
    douts = [draw(i, 3, *x.shape[2:]).to(x) for i, x in enumerate(outs, start=7)]
    near, far = (
        torch.autograd.grad(outs, (q, kv), each, retain_graph=True)
        for each in ([d[None] for d in douts], [far_apart(*d) for d in douts])
    )
    assert all(map(torch.equal, near, far))
