"""Attention against the formula written out in float64: outputs and every gradient, masks of every kind."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from expertune.attention import attend as module
from expertune.attention.attend import attend
from expertune.attention.hopper import Hopper
from expertune.attention.kernels import Pattern
from expertune.attention.sequences import Sequences
from expertune.attention.tiles import Tiles

B, H, J, T, D = 2, 4, 2, 23, 8


def inputs(*, values: int = D, dtype: torch.dtype = torch.float64, device: str = "cpu", **shape: int) -> list[Tensor]:
    """Queries, keys, values and sinks that want gradients."""
    b, h, j, t, d = (shape.get(name, default) for name, default in zip("bhjtd", (B, H, J, T, D), strict=True))
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(b, t, h, d), (b, t, j, d), (b, t, j, values)]
    made = [torch.randn(s, generator=draw, device=device).to(dtype).transpose(1, 2) for s in shapes]
    made.append(torch.randn(h, generator=draw, device=device).to(dtype))
    return [x.requires_grad_() for x in made]


def written_out(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask_BTS: Tensor, scale: float) -> Tensor:
    """The softmax over all scores and, with sinks, one more that has no value."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask_BTS[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]].nan_to_num() @ v).transpose(1, 2)


def gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs every number of `out` differently."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return list(torch.autograd.grad((out.double() * weights).sum(), of))


def causal(t: int = T, window: int | None = None, device: str = "cpu") -> Tensor:
    before = torch.arange(t, device=device)[:, None] - torch.arange(t, device=device)
    return ((before >= 0) & (before < (window or t)))[None]


def same(sequence_BT: Tensor) -> Tensor:
    return sequence_BT[:, :, None] == sequence_BT[:, None]


@pytest.fixture(params=[2**25, 600], ids=["one tile", "tiles"])
def _tiles(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.attention.tiles._SCORES", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("values", [D, 5])
@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("has_sinks", [True, False], ids=["sinks", "plain"])
def test_it_is_the_formula(has_sinks: bool, window: int | None, values: int) -> None:
    tensors = inputs(values=values)
    used = tensors if has_sinks else tensors[:3]
    sinks = tensors[3] if has_sinks else None
    out = attend(*tensors[:3], scale=0.3, window=window, sinks_H=sinks)
    expected = written_out(*tensors[:3], sinks, causal(window=window), 0.3)
    torch.testing.assert_close([out, *gradients(out, used)], [expected, *gradients(expected, used)])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("window", [None, 4])
def test_packed_samples_do_not_see_each_other(window: int | None) -> None:
    position_BT = torch.tensor([[*range(9), *range(14)], [*range(3), *range(1), *range(19)]])
    sequence_BT = (position_BT == 0).cumsum(-1)
    tensors = inputs()
    out = attend(
        *tensors[:3], scale=0.3, window=window, sinks_H=tensors[3], sequences=Sequences.of_positions(position_BT)
    )
    expected = written_out(*tensors, causal(window=window) & same(sequence_BT), 0.3)
    torch.testing.assert_close([out, *gradients(out, tensors)], [expected, *gradients(expected, tensors)])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    is_token_BT = torch.arange(T) < torch.tensor([[T], [T - 7]])
    is_token_BT = is_token_BT.flip(-1) if side == "left" else is_token_BT
    tensors = inputs()
    out = attend(*tensors[:3], scale=0.3, window=5, sinks_H=tensors[3], sequences=Sequences.of_padding(is_token_BT))
    mask_BTS = causal(window=5) & is_token_BT[:, None] & is_token_BT[:, :, None]
    expected = written_out(*tensors, mask_BTS, 0.3)
    torch.testing.assert_close([out, *gradients(out, tensors)], [expected, *gradients(expected, tensors)])
    assert not out[~is_token_BT].any()


def test_positions_of_whole_samples_are_no_sequences() -> None:
    assert Sequences.of_positions(torch.arange(T).expand(B, T)) is None
    assert Sequences.of_positions(torch.arange(5, 5 + T)[None]) is None


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("form", ["bool", "added", "a head"])
def test_a_mask_stands_for_itself(form: str) -> None:
    mask_BTS = torch.rand(B, T, T, generator=torch.Generator().manual_seed(1)) < 0.5
    mask_BTS[:, 3] = False  # a query that attends to nothing
    mask = mask_BTS[:, None]
    if form == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    elif form == "a head":
        mask = mask.expand(B, H, T, T)
    tensors = inputs()
    out = attend(*tensors[:3], scale=0.3, mask=mask)
    expected = written_out(*tensors[:3], None, mask_BTS, 0.3)
    # the formula's own gradient is not a number where a row has no score
    grads = gradients(attend(*tensors[:3], scale=0.3, mask=mask), tensors[:3])
    filled = written_out(*tensors[:3], torch.full((H,), -1e300, dtype=torch.float64), mask_BTS, 0.3)
    torch.testing.assert_close([out, *grads], [expected, *gradients(filled, tensors[:3])])


def test_more_keys_than_queries_want_a_mask() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="4 queries and 23 keys"):
        attend(q[:, :, :4], k, v, scale=1.0)


def test_it_keeps_what_grows_with_the_length_alone() -> None:
    tensors = inputs(dtype=torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(*tensors[:3], scale=0.3, sinks_H=tensors[3])
    # queries, keys, values, output and one number a query and head; the sinks
    assert sum(t.numel() for t in saved) == B * T * (2 * H * D + 2 * J * D + H) + H


# the log-sum-exp and the share of the sinks round once more in float32, which 16 bits do not notice
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1.6), (torch.float16, 1.1), (torch.bfloat16, 1.1)])
def test_rounding_is_no_worse_than_the_formula_s(dtype: torch.dtype, slack: float) -> None:
    exact = [x.detach().to(dtype).double().requires_grad_() for x in inputs(h=32, j=4, t=64)]
    truth = written_out(*exact, causal(64), 0.3)
    tensors = [x.detach().to(dtype).requires_grad_() for x in exact]
    ours = attend(*tensors[:3], scale=0.3, sinks_H=tensors[3])
    plain = written_out(*tensors, causal(64), 0.3)
    for got, other, true in zip(
        [ours, *gradients(ours, tensors)],
        [plain, *gradients(plain, tensors)],
        [truth, *gradients(truth, exact)],
        strict=True,
    ):
        assert (got.double() - true).norm() <= slack * (other.double() - true).norm()


@pytest.mark.parametrize("shared", [1.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_large_numbers_are_not_rounded_to_16_bits(dtype: torch.dtype, shared: float) -> None:
    """Queries and keys share a direction, as a bias of keys gives: in 16 bits their products round, or are infinite."""
    direction = shared * torch.randn(64, generator=torch.Generator().manual_seed(1))
    q, k, v, _ = (x.detach() for x in inputs(b=1, t=64, d=64, values=64, dtype=torch.float64))
    q, k, v = ((x + y).to(dtype) for x, y in ((q, direction), (k, direction), (v, 0)))
    mask = causal(64, window=63)
    truth = written_out(q.double(), k.double(), v.double(), None, mask, 0.125)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    theirs = sdpa(q, k, v, attn_mask=mask[:, None], scale=0.125, enable_gqa=True).transpose(1, 2)
    ours = attend(q, k, v, scale=0.125, window=63)
    assert (ours.double() - truth).norm() <= 3 * (theirs.double() - truth).norm()


def test_of_nothing_comes_nothing() -> None:
    for shape in ({"t": 0}, {"b": 0}):
        tensors = inputs(**shape)
        out = attend(*tensors[:3], scale=0.3, sinks_H=tensors[3])
        assert out.numel() == 0
        assert [grad.abs().sum() for grad in gradients(out, tensors)] == [0] * 4
    q, k, v, sinks = inputs()
    nobody = Sequences.of_padding(torch.zeros(B, T, dtype=torch.bool))
    assert not attend(q, k, v, scale=0.3, sinks_H=sinks, sequences=nobody).any()


@pytest.mark.parametrize("width", [64, 128])
def test_whole_samples_with_narrow_heads_are_ours_with_sinks_and_on_few_tokens(width: int) -> None:
    q_BHTD = torch.empty(1, 64, 2049, width, device="meta", dtype=torch.bfloat16)

    def why_not(length: int, *, has_sinks: bool) -> str:
        q = q_BHTD[:, :, :length]
        return str(Hopper().why_not(q, q, Pattern(scale=1.0, has_sinks=has_sinks)))

    assert why_not(2048, has_sinks=True) == "needs a CUDA device, these tensors are on meta"
    assert why_not(2049, has_sinks=True).startswith("leaves whole samples of more than 2,048 tokens to others")
    assert why_not(2048, has_sinks=False).startswith(f"leaves whole samples with heads of {width} to others")


class _Notes(Tiles):
    """Whether each backward was told that it may write over what attended, and over the gradient."""

    def __init__(self) -> None:
        self.told: list[tuple[bool, bool]] = []

    def backward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *_, pattern = given
        self.told.append((pattern.overwrites, pattern.overwrites_gradient))
        return super().backward(*given)


@pytest.mark.parametrize("kind", ["plain", "window", "sinks"])
@pytest.mark.parametrize("overwrites", [False, True])
def test_only_the_last_backward_writes_over_what_attended_and_only_a_recorded_one_over_the_gradient(
    kind: str, overwrites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _Notes()
    monkeypatch.setattr(module, "BEYOND_SDPA", (kernel,))
    monkeypatch.setattr(module, "PREFERRED", (kernel,))
    q, k, v, sinks = inputs()
    settings = {"window": {"window": 3}, "sinks": {"sinks_H": sinks}}.get(kind, {})
    out = attend(q, k, v, scale=0.3, overwrites=overwrites, **settings).sum()  # type: ignore[arg-type]
    out.backward(retain_graph=True)
    with monkeypatch.context() as recorded:
        recorded.setattr(module, "_is_recorded", lambda _: True)
        out.backward(retain_graph=True)
    out.backward()
    assert kernel.told == [(False, False), (False, overwrites), (overwrites, False)]
