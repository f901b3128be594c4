"""A tiny Qwen3-MoE with random weights, and a tokenizer that has one token a word."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_PAD, _UNKNOWN, _END, _USER, _PARROT = "<pad>", "<unknown>", "<end>", "<user>", "<parrot>"

# `generation` marks the answer, for trainers that take the loss there alone
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<parrot> {% generation %}{{ message['content'] }} <end>{% endgeneration %}"
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<parrot> {% endif %}"
)


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words, with a chat template."""
    special = [_PAD, _UNKNOWN, _END, _USER, _PARROT]
    ids = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=[_USER, _PARROT],
        chat_template=_CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_untrained(folder: Path, words: Sequence[str], *, seed: int) -> int:
    """Write a Qwen3-MoE with random float32 weights and its tokenizer; returns the number of its parameters."""
    tokenizer = build_tokenizer(words)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())
