"""Numbers and text of tools and of their calls, exactly.

`datasets` keeps what differs from row to row as JSON, whose numbers it rounds: 52.52000681234568 to ten decimals, 12.3
now and then to 12.300000000000001. And of text that reads as JSON, such as "1.5", it makes a number. So both lie in the
table as text that nobody writes, and the tokenizer's chat template, through which all of it goes, is given them back.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"  # a character for private use


def nested_as_text(value: Any) -> Any:
    """The same lists and dictionaries, with marked text in the place of numbers, and of text that reads as JSON.

    What is neither list nor dictionary stays: text that is no part of a conversation, and tools that are text.
    """
    return _as_text(value) if isinstance(value, list | dict) else value


def as_it_was(value: Any) -> Any:
    """What `nested_as_text` was given."""
    if isinstance(value, list):
        return [as_it_was(each) for each in value]
    if isinstance(value, dict):
        return {key: as_it_was(each) for key, each in value.items()}
    return json.loads(value[1:]) if isinstance(value, str) and value.startswith(_MARK) else value


@contextmanager
def given_back_by(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Around what renders conversations of a table: the chat template is given them as they were."""
    render = tokenizer.apply_chat_template

    def apply_chat_template(conversation: Any, tools: Any = None, **settings: Any) -> Any:
        return render(as_it_was(conversation), tools=as_it_was(tools), **settings)

    vars(tokenizer)["apply_chat_template"] = apply_chat_template
    try:
        yield
    finally:
        del vars(tokenizer)["apply_chat_template"]


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{_MARK}{json.dumps(value)}" if is_number or (isinstance(value, str) and _reads(value)) else value


def _reads(text: str) -> bool:
    """Whether it would be read as JSON, or as marked."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith(_MARK)
    return True
