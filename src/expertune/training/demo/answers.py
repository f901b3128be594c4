"""What a model answers, and how many answers are exactly right."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_MAX_NEW_TOKENS = 16  # the longest answer has 7 words and an end


@torch.inference_mode()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[str]:
    """The model's greedy answer to each question, asked through the chat template, all in one batch."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    was_training = model.training
    model.eval()
    tokens = model.generate(
        **batch.to(model.device),
        max_new_tokens=_MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train(was_training)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that are the expected one, word for word, in percent."""
    right = sum(given == wanted for given, wanted in zip(answers, expected, strict=True))
    return 100 * right / len(expected)
