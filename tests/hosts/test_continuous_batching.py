"""Continuous batching on a model of ours: what stock generates, and our attention again in training."""

import copy
from contextlib import suppress

import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

import expertune
from expertune.hosts import attention
from tests.conftest import Checkpoint
from tests.hosts.models import batch, load_tiny
from tests.hosts.passes import assert_equal_within, run

if not hasattr(transformers, "ContinuousBatchingConfig"):
    pytest.skip("this Transformers has no such continuous batching", allow_module_level=True)

GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=63, pad_token_id=0)
SMALL = transformers.ContinuousBatchingConfig(block_size=16, num_blocks=8, max_batch_tokens=32)
PROMPTS = [[1, 5, 9, 13], [1, 7], [1, 20, 21, 22, 23, 24]]


def generated(model: PreTrainedModel) -> list[list[int]]:
    outputs = model.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=SMALL, progress_bar=False
    )
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_host_generates_and_ours_attends_in_training_again(checkpoint: Checkpoint, family: str) -> None:
    stock = load_tiny(checkpoint(family), torch.float32)
    ours = expertune.optimize(copy.deepcopy(stock))
    expected, before, name = generated(stock), run(ours.train(), batch()), ours.config._attn_implementation
    assert attention.is_ours(ours.model)
    for _ in range(2):
        assert generated(ours) == expected
        assert not attention.is_ours(ours.model)
        assert_equal_within(run(ours.train(), batch()), before, 0)
        assert ours.config._attn_implementation == name
    generated(ours)
    with torch.no_grad():
        ours.eval()(**batch())
    assert attention.is_ours(ours.model), "in evaluation, too, once it has ended"
    with ours.continuous_batching_context_manager(GREEDY, continuous_batching_config=SMALL):
        with suppress(ValueError):  # some versions of Transformers refuse what is not in the batches meanwhile
            ours.train()(**batch())
        assert not attention.is_ours(ours.model), "it runs"
        ours.eval()
    assert_equal_within(run(ours.train(), batch()), before, 0)
    assert attention.is_ours(ours.model)
    assert generated(expertune.restore(ours)) == expected
    assert ours.config._attn_implementation == stock.config._attn_implementation


def test_an_attention_that_is_chosen_meanwhile_stays(checkpoint: Checkpoint) -> None:
    ours = expertune.optimize(load_tiny(checkpoint("qwen3_moe"), torch.float32))
    generated(ours)
    ours.set_attn_implementation("eager")
    ours.train()(**batch())
    assert ours.config._attn_implementation == "eager"
