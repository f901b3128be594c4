"""The data of `loss_curves.py`: rows of text, and a small tokenizer trained on them."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from expertune.training import files
from expertune.training.demo.questions import Questions, translating

_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}  # ids 0, 1, 2, as the shapes have them
_MOST_TOKENS = 4096  # in the vocabulary; the rows are few
_CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"


def read_rows(path: Path | None, number: int) -> list[dict[str, Any]]:
    """The first rows of a file, or the demo's sentences with their translations.

    Args:
        path: of a file that `expertune train` reads, whose rows have `prompt` and `completion`, `question` and
            `answer` (GSM8K), or `messages`. None: the demo's.
        number: of rows, at most.

    Raises:
        ValueError: a row has none of them.
    """
    if path is None:
        pairs = translating(Questions(seed=0).train(number))
        return [{"prompt": question, "completion": f" {answer}"} for question, answer in pairs]
    rows = files.read_rows(str(path), split=None, default_split="train", config=None)
    return [_row(row, where) for where, row in islice(rows, number)]


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    if {"question", "answer"} <= row.keys():
        return {"prompt": row["question"], "completion": f"\n{row['answer']}"}
    if not ({"prompt", "completion"} <= row.keys() or "messages" in row):
        raise ValueError(
            f"{where}: expected prompt and completion, question and answer, or messages, got {sorted(row)}"
        )
    return row


def train_tokenizer(rows: list[dict[str, Any]], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most this many tokens, trained on the rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, _MOST_TOKENS),
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.dumps(row, ensure_ascii=False) for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL, chat_template=_CHAT)
