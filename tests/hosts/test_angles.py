"""Angles of rotary embeddings are computed once for batches of one shape, and anew for whatever may change them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import expertune
from expertune.hosts import forwards
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny
from tests.hosts.recorded import tokens

FAMILIES = {"qwen3_moe": 1, "gpt_oss": 1, "glm4_moe_lite": 1, "gemma3_text": 2}  # how often a forward asks


class Pair:
    """A model and the host's own, and how often the former's embedding has computed."""

    def __init__(self, checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, self.stock = (load_tiny(checkpoint(family), torch.float32).train() for _ in range(2))
        expertune.optimize(self.ours)
        self.computed = 0
        kind = type(self.ours.model.rotary_emb)
        host = kind.forward

        def counting(module: nn.Module, x: torch.Tensor, position_ids: torch.Tensor, *others: Any) -> Any:
            self.computed += module is self.ours.model.rotary_emb
            return host(module, x, position_ids, *others)

        counting.__wrapped__ = host  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, "forward", counting)

    def __call__(self, ids: torch.Tensor, **inputs: Any) -> int:
        """How often angles were computed for a batch, whose logits are the host's."""
        before = self.computed
        settings = {"use_cache": False} | inputs
        ours, stock = (model(input_ids=ids, **settings).logits for model in (self.ours, self.stock))
        torch.testing.assert_close(ours, stock)
        return self.computed - before


@pytest.fixture
def pair(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pair]:
    return lambda family: Pair(checkpoint, family, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_once_for_a_shape(pair: Callable[[str], Pair], family: str) -> None:
    batch, times = pair(family), FAMILIES[family]
    assert [batch(tokens(seed)) for seed in range(3)] == [times, 0, 0]
    assert [batch(tokens(seed, length=9)) for seed in range(2)] == [times, 0]
    assert batch(tokens(0)) == times, "those of the last shape alone are kept"


def test_a_padded_batch_is_as_a_whole_one(pair: Callable[[str], Pair]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0)
    mask = torch.ones_like(ids)
    assert [batch(ids, attention_mask=mask) for _ in range(2)] == [1, 0]


def test_given_positions_are_read(pair: Callable[[str], Pair]) -> None:
    """Also in place of those that were counted before."""
    batch, ids = pair("qwen3_moe"), tokens(0)
    later = torch.arange(ids.shape[1])[None] + 5
    assert batch(ids) == 1
    assert [batch(ids, position_ids=later + i) for i in range(2)] == [1, 1]
    assert batch(ids) == 0


def test_positions_behind_a_cache_are_counted_on(pair: Callable[[str], Pair]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0, length=4)
    batch(ids)
    with torch.no_grad():
        grown = [model(input_ids=ids, use_cache=True) for model in (batch.ours, batch.stock)]
        caches = [getattr(out, "past_key_values", None) or out.cache for out in grown]
        name = "past_key_values" if hasattr(grown[0], "past_key_values") else "cache"
        outs = [
            model(input_ids=ids, use_cache=True, **{name: cache}).logits
            for model, cache in zip((batch.ours, batch.stock), caches, strict=True)
        ]
    torch.testing.assert_close(*outs)


def _write_to_frequencies(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _replace_frequencies(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def _scale(model: nn.Module) -> None:
    model.model.rotary_emb.attention_scaling = 0.5


@pytest.mark.parametrize("change", [_write_to_frequencies, _replace_frequencies, _scale])
def test_what_they_are_made_of_may_change(pair: Callable[[str], Pair], change: Callable[[nn.Module], None]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0)
    assert [batch(ids) for _ in range(2)] == [1, 0]
    with torch.no_grad():
        for model in (batch.ours, batch.stock):
            change(model)
    assert [batch(ids) for _ in range(2)] == [1, 0]


def test_who_writes_to_them_does_so_once(pair: Callable[[str], Pair]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0)
    embedding = batch.ours.model.rotary_emb
    assert batch(ids) == 1

    def double(_module: nn.Module, _args: Any, angles: tuple[torch.Tensor, ...]) -> None:
        angles[0].mul_(2.0)

    handle = embedding.register_forward_hook(double)
    batch.ours(input_ids=ids, use_cache=False)
    handle.remove()
    assert batch(ids) == 1


def test_called_by_others_it_is_the_hosts(pair: Callable[[str], Pair]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0)
    batch(ids)
    x, positions = torch.zeros(1, ids.shape[1], 4), torch.arange(ids.shape[1])[None] + 3
    found, expected = (model.model.rotary_emb(x, positions) for model in (batch.ours, batch.stock))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_copy_keeps_its_own(pair: Callable[[str], Pair]) -> None:
    batch, ids = pair("qwen3_moe"), tokens(0)
    batch(ids)
    twin = copy.deepcopy(batch.ours)
    _write_to_frequencies(twin)
    assert batch(ids) == 0
    _write_to_frequencies(batch.stock)
    torch.testing.assert_close(*(model(input_ids=ids, use_cache=False).logits for model in (twin, batch.stock)))


def test_it_is_undone(checkpoint: Checkpoint) -> None:
    model = expertune.optimize(load_tiny(checkpoint("qwen3_moe")))
    assert forwards.given(model.model.rotary_emb) is not None
    expertune.restore(model)
    assert forwards.given(model.model.rotary_emb) is None


def test_other_positions_in_the_same_forward_are_read(pair: Callable[[str], Pair]) -> None:
    """Of the same shape, and gone by the time that others are asked for, so that they may lie at one address."""
    batch, ids = pair("qwen3_moe"), tokens(0)
    found: list[list[torch.Tensor]] = [[], []]

    def ask(model: nn.Module, angles: list[torch.Tensor]) -> None:
        x = torch.zeros(1, ids.shape[1], 4)
        for first in (3, 5):
            angles += model.model.rotary_emb(x, torch.arange(first, first + ids.shape[1])[None])

    for model, angles in zip((batch.ours, batch.stock), found, strict=True):
        model.model.layers[0].register_forward_pre_hook(lambda *_, model=model, angles=angles: ask(model, angles))
    for _ in range(2):
        batch(ids)
    torch.testing.assert_close(*found, rtol=0, atol=0)
