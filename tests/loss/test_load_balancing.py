"""The balance loss of all layers at once against the host's, layer by layer."""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as hosts

from expertune.loss import load_balancing
from tests.cases import DEVICE
from tests.numerics import assert_no_worse

NUM_LAYERS, BATCH, SEQUENCE, E, TOP_K = 5, 2, 7, 12, 3


def draw(dtype: torch.dtype) -> list[Tensor]:
    """On a grid that bfloat16 holds, and no two of a row equal, so that no order of equals is asked for."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(E, generator=generator) / 4 - 1 for _ in range(NUM_LAYERS * BATCH * SEQUENCE)]
    return [each.to(DEVICE, dtype).requires_grad_() for each in torch.stack(rows).chunk(NUM_LAYERS)]


def masks() -> dict[str, Tensor | None]:
    padded = torch.ones(BATCH, SEQUENCE, dtype=torch.int64, device=DEVICE)
    padded[0, -3:] = 0
    padded[1, :2] = 0
    return {"none": None, "all": torch.ones_like(padded), "padded": padded}


def definition(logits: tuple[Tensor, ...], num_experts: int, top_k: int, mask: Tensor | None) -> Tensor:
    """In the logits' own dtype, where the host sums in float32."""
    p = torch.cat(logits).softmax(-1)
    weight = torch.ones_like(p[:, :1]) if mask is None else mask.reshape(-1, 1).to(p.dtype).repeat(len(logits), 1)
    chosen = torch.zeros_like(p).scatter_(1, p.topk(top_k).indices, 1.0)
    fraction, probability = ((weight * x).sum(0) / weight.sum() for x in (chosen, p))
    return num_experts * (fraction * probability).sum()


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
@pytest.mark.parametrize("layers_at_once", [1, 2, NUM_LAYERS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_the_hosts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layers_at_once: int, mask: Tensor | None
) -> None:
    monkeypatch.setattr(load_balancing, "NUM_ELEMENTS", layers_at_once * BATCH * SEQUENCE * E)
    results = []
    for function, kind in (
        (load_balancing.load_balancing_loss_func, dtype),
        (hosts, dtype),
        (definition, torch.float64),
    ):
        logits = draw(kind)
        loss = function(tuple(logits), E, TOP_K, mask)
        (2 * loss).backward()
        results.append((loss.detach(), torch.cat([each.grad for each in logits])))
    (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = results
    assert grad.dtype == dtype
    assert_no_worse(loss, plain_loss, exact_loss, "loss")
    assert_no_worse(grad, plain_grad, exact_grad, "gradient")


def test_a_model_without_routers_has_none() -> None:
    assert load_balancing.load_balancing_loss_func(None) == 0
    assert load_balancing.load_balancing_loss_func(torch.ones(1)) == 0


def test_nothing_but_the_logits_is_kept() -> None:
    logits = draw(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        load_balancing.load_balancing_loss_func(tuple(logits), E, TOP_K)
    others = {x.data_ptr(): x.numel() for x in kept if all(x is not each for each in logits)}
    assert sum(n for address, n in others.items() if address not in {x.data_ptr() for x in logits}) == E
