"""Routings that break kernels: which experts each token chooses, by name."""

import torch
from torch import Tensor

NUM_EXPERTS = 6


def _random(num_tokens: int, top_k: int, experts: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 31 + top_k)
    scores = torch.rand(num_tokens, len(experts), generator=generator)
    return torch.tensor(experts)[scores.topk(top_k, dim=-1).indices]


ROUTINGS: dict[str, Tensor] = {
    "even": _random(19, 2, list(range(NUM_EXPERTS))),
    "empty experts": _random(19, 2, [1, 4]),
    "one hot expert": torch.cat([_random(4, 2, list(range(NUM_EXPERTS))), torch.tensor([[3, 0]]).repeat(15, 1)]),
    "all tokens on one": torch.full((17, 1), 5),
    "one token": torch.tensor([[4, 2]]),
    "zero tokens": torch.empty(0, 2, dtype=torch.long),
    "top-1": _random(13, 1, list(range(NUM_EXPERTS))),
    "every expert": torch.arange(NUM_EXPERTS).repeat(5, 1),
}
