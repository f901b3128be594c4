"""A model of ours under torch.nn.DataParallel, which would compute with the modules that it copied."""

import pytest
import torch
from torch import nn

import expertune
from tests.conftest import Checkpoint
from tests.hosts.adapters import lora, stock


def copied(model: nn.Module) -> list[nn.Module]:
    """As `torch.nn.parallel.replicate` copies modules, which asks for GPUs first."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


def test_it_is_refused_until_restored(checkpoint: Checkpoint) -> None:
    model = stock(checkpoint("qwen3_moe"), lora(), torch.float32)
    for _ in range(2):
        expertune.optimize(model)
        with pytest.raises(ValueError, match=r"DataParallel cannot copy .*torchrun.*CUDA_VISIBLE_DEVICES=0"):
            copied(model)
    assert copied(expertune.restore(model))
