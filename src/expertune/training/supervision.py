"""What the loss is taken on: counted after TRL has tokenised and masked, before the first step.

TRL drops rows whose answer `max_length` cuts off, without a word. Here such a row is an error that names it.
"""

import json
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from expertune.hosts.label_rows import IGNORED
from expertune.training.errors import UserError, one_paragraph

_BEHIND_A_STOP = 2  # tokens, such as a line's end, that a template may put there


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """A tokenised data set cut to length, and what is learnt from it.

    Args:
        dataset: with `input_ids` and `labels`, at most `max_length` tokens a row.
        num_tokens: in it.
        num_supervised: those that the loss is taken on.
        num_cut: rows that lost supervised tokens.
    """

    dataset: Dataset
    num_tokens: int
    num_supervised: int
    num_cut: int

    def __str__(self) -> str:
        share = 100 * self.num_supervised / self.num_tokens
        return (
            f"{len(self.dataset):,} rows, {self.num_tokens:,} tokens, "
            f"the loss is on {self.num_supervised:,} of them ({share:.0f} %)"
        )


def ends_with_any(dataset: Dataset, stops: Set[int]) -> bool:
    """Whether what is learnt of any row ends with a token that stops generation.

    Args:
        dataset: with `labels`.
        stops: ids of such tokens.
    """
    return any(
        not stops.isdisjoint([label for label in labels if label != IGNORED][-_BEHIND_A_STOP - 1 :])
        for labels in dataset["labels"]
    )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot tell the assistant's tokens from the others.

    Raises:
        UserError: it has no `{% generation %}` marks, and TRL has no template for training in its place.
    """
    if _is_marked(tokenizer.chat_template):
        return
    try:
        training_template = get_training_chat_template(tokenizer)
    except ValueError:  # TRL's, for a template that it does not know
        training_template = None
    if training_template is None or not _is_marked(training_template):
        raise UserError(
            "the tokenizer's chat template does not mark what the assistant says, and TRL knows no training version of "
            "it, so the loss would fall on the questions too. Set chat_template_path to a template with "
            "{% generation %} around the assistant's words, or give the data as prompt and completion."
        )


def first_row_refused(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The index of the first conversation that the chat template does not take; None where it takes all."""
    template = _training_template(dataset, tokenizer)
    for index, row in enumerate(dataset):
        try:
            if "messages" in row:
                _render(row["messages"], row, tokenizer, template)
            elif isinstance(row.get("prompt"), list):
                _render(row["prompt"], row, tokenizer, template, add_generation_prompt=True)
                _render(row["prompt"] + row["completion"], row, tokenizer, template)
        except (TemplateError, TypeError, ValueError, ArithmeticError):  # by itself, or where it adds text and None
            return index
    return None


def first_row_without_answer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """The index of the first conversation in which the chat template marks no token of the assistant."""
    template = _training_template(dataset, tokenizer)
    for index, row in enumerate(dataset):
        rendered = _render(row["messages"], row, tokenizer, template, return_assistant_tokens_mask=True)
        if not any(rendered["assistant_masks"]):
            return index
    raise AssertionError("every row has a token of the assistant")


def _training_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """By which TRL renders conversations in place of the tokenizer's own template; None where that will do."""
    if "messages" not in dataset.column_names or _is_marked(tokenizer.chat_template):
        return None
    template: str | None = get_training_chat_template(tokenizer)
    return template


def _render(
    messages: list[Any], row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, **settings: bool
) -> Any:
    """The tokens of messages of a row, as TRL has them."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=True, **settings)


def _is_marked(template: str | dict[str, str]) -> bool:
    text = template["default"] if isinstance(template, dict) else template
    return re.search(r"\{%-?\s*generation\b", text) is not None


def supervise(dataset: Dataset, where: Sequence[str], max_length: int | None) -> Supervision:
    """Cut rows to length and count what is left to learn.

    Args:
        dataset: as TRL tokenised it, uncut, with `input_ids` and `labels`, or with the masks that make labels.
        where: each row came from, in words.
        max_length: in tokens; None cuts nothing.

    Raises:
        UserError: a row has no supervised token, or none within `max_length`.
    """
    dataset = _with_labels(dataset).select_columns(["input_ids", "labels"])
    num_tokens = num_supervised = num_cut = 0
    silent, cut_off = [], []
    for labels, place in zip(dataset["labels"], where, strict=True):
        # no token is predicted before the first, so its label is never used
        whole, kept = _count(labels[1:]), _count(labels[1:max_length])
        num_tokens += len(labels[:max_length])
        num_supervised += kept
        num_cut += kept < whole
        if not whole:
            silent.append(place)
        elif not kept:
            cut_off.append(place)
    if silent:
        raise nothing_to_learn(silent)
    if cut_off:
        raise UserError(
            f"{_places(cut_off)}: the prompt alone fills max_length={max_length} tokens, so the answer is cut off and "
            "there is nothing to learn. Raise max_length, or remove the row."
        )
    if max_length is not None and any(len(ids) > max_length for ids in dataset["input_ids"]):
        dataset = dataset.map(
            lambda row: {"input_ids": row["input_ids"][:max_length], "labels": row["labels"][:max_length]}
        )
    return Supervision(dataset=dataset, num_tokens=num_tokens, num_supervised=num_supervised, num_cut=num_cut)


def check_positions(supervision: Supervision, where: Sequence[str], num_positions: int | None) -> None:
    """Refuse rows that are longer than what the model can tell apart.

    Args:
        supervision: what `supervise` gave.
        where: each row came from, in words.
        num_positions: of the model; None where it has no limit.

    Raises:
        UserError: names the first such row, its length, and the `max_length` that cuts it.
    """
    if num_positions is None:
        return
    lengths = [len(ids) for ids in supervision.dataset["input_ids"]]
    if too_long := [place for place, length in zip(where, lengths, strict=True) if length > num_positions]:
        length = next(length for length in lengths if length > num_positions)
        raise UserError(
            f"{_places(too_long)}: {length} tokens are beyond the {num_positions} positions of this model. Set "
            f"max_length={num_positions}, which cuts such rows at the end, or shorten them."
        )


def check_vocabulary(
    supervision: Supervision, where: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_embeddings: int
) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        supervision: what `supervise` gave.
        where: each row came from, in words.
        tokenizer: that made the tokens, and pads with another.
        num_embeddings: of the model.

    Raises:
        UserError: names the first row with such a token, or the token that pads.
    """
    highest = zip(where, map(max, supervision.dataset["input_ids"]), strict=True)
    if strange := [(place, token) for place, token in highest if token >= num_embeddings]:
        places = _places([place for place, _ in strange])
        raise _unknown_token(places, strange[0][1], tokenizer, num_embeddings)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_embeddings:
        raise _unknown_token("what batches are padded with", tokenizer.pad_token_id, tokenizer, num_embeddings)


def _unknown_token(place: str, token: int, tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> UserError:
    return UserError(
        f"{place}: token {token}, {tokenizer.convert_ids_to_tokens(token)!r}, is beyond the {num_embeddings} that the "
        f"model knows; the tokenizer has {len(tokenizer)}. Take the tokenizer that belongs to the model, or give the "
        "model as many embeddings (resize_token_embeddings), save it, and begin from that."
    )


def _with_labels(dataset: Dataset) -> Dataset:
    """TRL before 1.8 leaves masks, which its collator would turn into labels; both take the labels that are there."""
    if "labels" in dataset.column_names:
        return dataset
    masks = [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]

    def make_labels(row: dict[str, list[int]]) -> dict[str, list[int]]:
        kept = zip(row["input_ids"], *(row[mask] for mask in masks), strict=True)
        return {"labels": [token if all(bits) else IGNORED for token, *bits in kept]}

    return dataset.map(make_labels)


def nothing_to_learn(places: Sequence[str]) -> UserError:
    """The error for rows, in words, that have no supervised token."""
    return UserError(
        f"{_places(places)}: no token to learn from; the tokenizer and its chat template leave nothing of the answer. "
        "Mend or remove the row, or change the template (chat_template_path)."
    )


def refused_by_template(place: str, error: Exception) -> UserError:
    """The error for a row, in words, that the chat template does not take, with what the template says."""
    return UserError(
        f"{place}: the chat template does not take this row: {one_paragraph(error)}. Mend or remove the row, or change "
        "the template (chat_template_path)."
    )


def _count(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _places(places: Sequence[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} (and {len(places) - 1} more rows)"
