"""The data of a run: rows read and checked, split, and made into the data sets that TRL tokenises."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from expertune.training.errors import UserError, one_paragraph
from expertune.training.exact_json import nested_as_text
from expertune.training.files import Row, names_twice, read_rows
from expertune.training.recipe import Recipe
from expertune.training.rows import alpaca_to_prompt, detect, make_row, unread


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Checked rows of one shape.

    Args:
        shape: a key of `rows.COLUMNS`, as the data had it.
        values: a row each, in the shape that `rows.make_row` gives.
        where: each row came from, in words, for messages.
        unread: columns of the data that hold something, and that no row of this shape has.
    """

    shape: str
    values: tuple[dict[str, Any], ...]
    where: tuple[str, ...]
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


def read_data(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Read and check the rows to train on, and those to evaluate on, if the recipe names any.

    Raises:
        UserError: the data is not there, has no shape that is known, or a row is wrong.
    """
    rows = read_rows(
        recipe.dataset_name,
        split=recipe.dataset_train_split,
        default_split="train",
        config=_config(recipe, recipe.dataset_name),
    )
    train = _checked(recipe.dataset_name, rows, recipe)
    if (name := recipe.eval_dataset_name) is not None:
        split, config = recipe.dataset_test_split, _config(recipe, name)
        rows = read_rows(name, split=split, default_split="test", config=config)
        held_out = _checked(name, rows, recipe)
        if _kind(held_out) != _kind(train):
            raise UserError(
                f"{name!r} holds {_kind(held_out)}, but {recipe.dataset_name!r} {_kind(train)}. "
                "Give both the same shape."
            )
        return train, held_out
    if recipe.eval_size:
        return _split(train, recipe)
    return train, None


def _config(recipe: Recipe, name: str) -> str | None:
    """`dataset_config` for one of the recipe's data sets: not for a file where the other one is of the hub."""
    names = [each for each in (recipe.dataset_name, recipe.eval_dataset_name) if each is not None]
    is_for_another = Path(name).exists() and not all(Path(each).exists() for each in names)
    return None if is_for_another else recipe.dataset_config


def to_dataset(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows in a shape of TRL: text, prompt and completion, or messages, as `exact_json` has them.

    Raises:
        UserError: the rows need a chat template or an end-of-text token, and the tokenizer has none.
    """
    values: Iterable[dict[str, Any]] = rows.values
    if rows.shape == "alpaca":
        values = [alpaca_to_prompt(row, chat=tokenizer.chat_template is not None) for row in rows.values]
    values = list(values)
    is_chat = "messages" in values[0] or isinstance(values[0].get("prompt"), list)
    if is_chat and tokenizer.chat_template is None:
        raise UserError(
            f"rows of the shape {rows.shape} are conversations, but the tokenizer has no chat template. Set "
            "chat_template_path to a Jinja file or to a model that has one, or give prompt and completion as strings."
        )
    if not is_chat and tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so the model could not learn to stop. Set eos_token in the "
            "model's tokenizer_config.json."
        )
    try:
        # not from_list, which takes the columns of the first row alone
        columns = dict.fromkeys(column for row in values for column in row)
        by_column = {column: [nested_as_text(row.get(column)) for row in values] for column in columns}
        # as JSON where rows differ: in one type for all, every call of a tool would have the arguments of all tools
        return Dataset.from_dict(by_column, on_mixed_types="use_json")
    except pa.ArrowException as error:
        raise UserError(
            f"the rows cannot be laid into one table: {one_paragraph(error)}. Give every row the same types; "
            "tools may be a JSON string."
        ) from error


def _checked(name: str, rows: Iterable[Row], recipe: Recipe) -> Rows:
    shape = ""
    values, places = [], []
    left: dict[str, None] = {}
    for where, row in rows:
        renamed = _rename(where, row, recipe.columns)
        if not shape:
            _check_renaming(row, recipe.columns)
            shape = detect(tuple(renamed), recipe.dataset_format)
        values.append(make_row(shape, where, renamed))
        places.append(where)
        left |= dict.fromkeys(unread(shape, renamed))
    if not values:
        raise UserError(f"{name!r} holds no rows. Check that it is the file you mean.")
    if shape == "prompt_completion":
        _check_one_kind(values, places)
    return Rows(shape=shape, values=tuple(values), where=tuple(places), unread=tuple(left))


def _rename(where: str, row: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    names = [columns.get(column, column) for column in row]
    if twice := names_twice(names):
        raise UserError(
            f"{where}: after columns renamed them, two columns of the data are called {', '.join(twice)}. Rename one."
        )
    return dict(zip(names, row.values(), strict=True))


def _check_renaming(row: dict[str, Any], columns: dict[str, Any]) -> None:
    if missing := [column for column in columns if column not in row]:
        raise UserError(
            f"columns names {', '.join(missing)}, but the data has the columns {', '.join(row)}. Correct the names."
        )


def _kind(rows: Rows) -> str:
    """The shape, and for prompts whether they are strings or lists of messages, which the loss treats apart."""
    prompt = rows.values[0].get("prompt")
    return f"{rows.shape} of messages" if isinstance(prompt, list) else rows.shape


def _check_one_kind(values: list[dict[str, Any]], places: list[str]) -> None:
    """Strings and messages do not go into one table, and mean different things to the tokenizer."""
    first = type(values[0]["prompt"])
    for value, where in zip(values, places, strict=True):
        if type(value["prompt"]) is not first:
            raise UserError(
                f"{where}: field 'prompt' holds a {type(value['prompt']).__name__}, but the rows before it a "
                f"{first.__name__}. Give strings or messages throughout."
            )


def _split(rows: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
    size = recipe.eval_size
    num_eval = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if num_eval >= len(rows):
        raise UserError(f"eval_size={size:g} would hold out {num_eval} of {len(rows)} rows and leave none to train on.")
    held_out = set(random.Random(recipe.seed).sample(range(len(rows)), num_eval))

    def pick(indices: Iterable[int]) -> Rows:
        chosen = list(indices)
        return Rows(
            shape=rows.shape,
            values=tuple(rows.values[i] for i in chosen),
            where=tuple(rows.where[i] for i in chosen),
            unread=rows.unread,
        )

    return pick(i for i in range(len(rows)) if i not in held_out), pick(sorted(held_out))
