"""LoRA factors: PEFT's layout ↔ the one that grouped products read, several active adapters joined along the rank.

PEFT keeps `lora_A` as `(E·R, I)`, expert-major, and `lora_B` as `(O, R·E)`, expert-fastest. A grouped product wants
one matrix an expert: `a_ERI` and `b_EOR`. Packing is done again in backward, unless the walk keeps the copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertune.shapes import LoraFactors

# Ranks are padded with zeros to a multiple of 8, because grouped products read rows of whole 16 bytes.
RANK_MULTIPLE = 8


def joined_rank(adapters: Sequence[LoraFactors], num_experts: int) -> int:
    """`R`: the ranks of all active adapters, added up and padded."""
    rank = sum(adapter.a.shape[0] // num_experts for adapter in adapters)
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def is_plain(adapters: Sequence[LoraFactors], num_experts: int) -> bool:
    """Whether nothing is joined: one adapter, of a rank that needs no padding."""
    return len(adapters) == 1 and adapters[0].a.shape[0] // num_experts == joined_rank(adapters, num_experts)


def pack(adapters: Sequence[LoraFactors], num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join the adapters of one projection to `a_ERI` and `scale · b_EOR`.

    The scale is folded into `b` before it is rounded to `dtype`, so that it costs no second rounding.
    """
    rank = joined_rank(adapters, num_experts)
    first = adapters[0]
    if is_plain(adapters, num_experts):
        a_ERI = first.a.to(dtype).view(num_experts, rank, -1)
        b_EOR = first.b.new_empty((num_experts, first.b.shape[0], rank), dtype=dtype)
        _scale(first.b.view(-1, rank, num_experts).permute(2, 0, 1), first.scale, b_EOR)
        return a_ERI, b_EOR
    a_ERI = first.a.new_empty((num_experts, rank, first.a.shape[1]), dtype=dtype)
    b_EOR = first.b.new_empty((num_experts, first.b.shape[0], rank), dtype=dtype)
    start = 0
    for adapter in adapters:
        a = adapter.a.view(num_experts, -1, adapter.a.shape[1])
        b = adapter.b.view(adapter.b.shape[0], -1, num_experts).permute(2, 0, 1)
        end = start + a.shape[1]
        a_ERI[:, start:end].copy_(a)
        _scale(b, adapter.scale, b_EOR[:, :, start:end])
        start = end
    if start < rank:
        a_ERI[:, start:].zero_()
        b_EOR[:, :, start:].zero_()
    return a_ERI, b_EOR


def turn(adapter: LoraFactors, num_experts: int) -> LoraFactors:
    """The factors of `Wᵀ` from those of `W`, in the same layout: input and output changed over. Copies."""
    b_ERI = adapter.b.view(adapter.b.shape[0], -1, num_experts).permute(2, 1, 0)
    a_ORE = adapter.a.view(num_experts, -1, adapter.a.shape[1]).permute(2, 1, 0)
    return LoraFactors(a=b_ERI.flatten(0, 1), b=a_ORE.flatten(1, 2), scale=adapter.scale)


def unpack_a_grads(da_ERI: Tensor, adapters: Sequence[LoraFactors]) -> list[Tensor]:
    """Cut the gradient of the packed `a_ERI` back to one gradient an adapter, in PEFT's layout and dtype."""
    grads, start = [], 0
    for adapter in adapters:
        rank = adapter.a.shape[0] // da_ERI.shape[0]
        grads.append(da_ERI[:, start : start + rank].reshape(adapter.a.shape).to(adapter.a.dtype))
        start += rank
    return grads


def unpack_b_grads(db_EOR: Tensor, adapters: Sequence[LoraFactors]) -> list[Tensor]:
    """The same for `b_EOR`, whose pack had the scale folded in."""
    grads, start = [], 0
    for adapter in adapters:
        rank = adapter.b.shape[1] // db_EOR.shape[0]
        grad = torch.empty_like(adapter.b, memory_format=torch.contiguous_format)
        of_adapter = db_EOR[:, :, start : start + rank].permute(1, 2, 0)
        _scale(of_adapter, adapter.scale, grad.view(adapter.b.shape[0], rank, -1))
        grads.append(grad)
        start += rank
    return grads


def _scale(x: Tensor, scale: float, out: Tensor) -> None:
    """`out = scale · x`, multiplied in the wider of both dtypes, without a copy of `x`."""
    if torch.promote_types(x.dtype, out.dtype) == x.dtype:
        torch.mul(x, scale, out=out)
    else:
        out.copy_(x).mul_(scale)


def alternate(das: Sequence[Tensor], dbs: Sequence[Tensor]) -> list[Tensor]:
    """`a, b, a, b, …`: the order in which the walk takes factors and returns their gradients."""
    return [grad for pair in zip(das, dbs, strict=True) for grad in pair]
