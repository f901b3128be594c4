"""The shapes that a row can have, checked, and made into the shapes that TRL takes.

| shape             | columns                               | becomes                                          |
|-------------------|---------------------------------------|--------------------------------------------------|
| text              | text                                  | itself; the loss is on every token               |
| prompt_completion | prompt, completion: strings, messages | itself; the loss is on the completion            |
| messages          | messages: [{role, content}, …]; tools | itself; the loss is on what the assistant says   |
| alpaca            | instruction, output; input            | prompt and completion, through the chat template |
| sharegpt          | conversations: [{from, value}, …];    | messages                                         |
|                   | system, tools                         |                                                  |

Prompt and completion that are messages may have tools, too.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

from expertune.training.errors import UserError

COLUMNS = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
_BESIDE = {"messages": ("tools",), "alpaca": ("input",), "sharegpt": ("system", "tools")}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def detect(columns: Collection[str], requested: str) -> str:
    """The shape of rows with these columns.

    Args:
        columns: of the data, renamed to ours.
        requested: a shape, or "auto".

    Raises:
        UserError: the columns fit none, or more than one.
    """
    seen = f"the data has the columns {', '.join(columns) or 'none'}"
    known = "; ".join(f"{shape}: {', '.join(needed)}" for shape, needed in COLUMNS.items())
    fitting = [shape for shape, needed in COLUMNS.items() if set(needed) <= set(columns)]
    if requested != "auto":
        if requested not in fitting:
            raise UserError(f"{seen}, but dataset_format {requested} needs {', '.join(COLUMNS[requested])}. {_RENAME}")
        return requested
    if not fitting:
        raise UserError(f"{seen}, which fit none of the shapes ({known}). {_RENAME}")
    if len(fitting) > 1:
        raise UserError(f"{seen}, which fit {' and '.join(fitting)}. Say which with dataset_format.")
    return fitting[0]


_RENAME = "Rename them with columns, as in columns={question: prompt, answer: completion}."


def unread(shape: str, row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold something, and that its shape does not have.

    Args:
        shape: a key of `COLUMNS`.
        row: its values by our column names.
    """
    read = {*COLUMNS[shape], *_BESIDE.get(shape, ())}
    if shape == "prompt_completion" and isinstance(row.get("prompt"), list):
        read.add("tools")
    return [name for name, value in row.items() if name not in read and value not in (None, "", [], {})]


def make_row(shape: str, where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Check one row and keep what its shape needs; ShareGPT becomes messages.

    Args:
        shape: a key of `COLUMNS`.
        where: the row came from, for the error.
        row: its values by our column names.

    Raises:
        UserError: a field is missing, empty or of another type; names the row and the field.
    """
    checked = _CHECKS[shape](where, row)
    try:
        json.dumps(checked, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: it holds half a character, as of a cut emoji. {_MEND}") from error
    return checked


def alpaca_to_prompt(row: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """Prompt and completion of an alpaca row: messages where the tokenizer has a chat template, else Alpaca's own text.

    The text is that of the Stanford Alpaca project, without its opening sentence.
    """
    if chat:
        question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
    context = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    prompt = f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


def _text(where: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"text": _string(where, "text", row)}


def _prompt_completion(where: str, row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), list) and not isinstance(row.get("completion"), list):
        return {field: _string(where, field, row) for field in ("prompt", "completion")}
    return {
        "prompt": _messages(where, "prompt", row, must_answer=False),
        "completion": _messages(where, "completion", row, must_answer=True),
        **_tools(where, row),
    }


def _chat(where: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _messages(where, "messages", row, must_answer=True), **_tools(where, row)}


def _alpaca(where: str, row: dict[str, Any]) -> dict[str, Any]:
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: field 'input' holds a {type(given).__name__}, expected a string. {_MEND}")
    return {
        "instruction": _string(where, "instruction", row),
        "input": given or "",
        "output": _string(where, "output", row),
    }


def _sharegpt(where: str, row: dict[str, Any]) -> dict[str, Any]:
    turns = _list(where, "conversations", row)
    messages = []
    for number, turn in enumerate(turns, start=1):
        field = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{where}: field {field!r} holds a {type(turn).__name__}, expected from and value. {_MEND}")
        speaker = turn.get("from")
        if speaker not in _SPEAKERS:
            raise UserError(
                f"{where}: field '{field}.from' is {speaker!r}, expected one of {', '.join(_SPEAKERS)}. {_MEND}"
            )
        content = _string(where, "value", turn, path=f"{field}.value")
        messages.append({"role": _SPEAKERS[speaker], "content": content})
    if row.get("system"):
        if messages[0]["role"] == "system":
            raise UserError(f"{where}: both field 'system' and the first turn are the system's. {_MEND}")
        messages.insert(0, {"role": "system", "content": _string(where, "system", row)})
    return {"messages": _messages(where, "messages", {"messages": messages}, must_answer=True), **_tools(where, row)}


def _tools(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The tools that a conversation may call, where the row has any: a list of JSON schemas, or that list as text."""
    if not row.get("tools"):
        return {}
    if came := _not_schemas(row["tools"]):
        raise UserError(f"{where}: field 'tools' holds {came}, expected a list of the tools' JSON schemas. {_MEND}")
    return {"tools": row["tools"]}


def _not_schemas(tools: Any) -> str | None:
    """What tools are instead of a list of JSON schemas, in words; None where they are one, or null."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            return f"text that is no JSON ({error})"
    if tools is None:
        return None
    if not isinstance(tools, list):
        return f"a {type(tools).__name__}"
    strange = [tool for tool in tools if not isinstance(tool, dict)]
    return f"a list with a {type(strange[0]).__name__} in it" if strange else None


_CHECKS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _chat,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
_MEND = "Mend or remove the row."


def _string(where: str, field: str, row: dict[str, Any], path: str | None = None) -> str:
    value = row.get(field)
    path = path or field
    if value is None:
        raise UserError(f"{where}: field {path!r} is missing or null. {_MEND}")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {path!r} holds a {type(value).__name__}, expected a string. {_MEND}")
    if not value.strip():
        raise UserError(f"{where}: field {path!r} is empty. {_MEND}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {path!r} holds half a character, as of a cut emoji. {_MEND}") from error
    return value


def _list(where: str, field: str, row: dict[str, Any]) -> list[Any]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        came = (
            "is empty" if value == [] else "is missing or null" if value is None else f"holds a {type(value).__name__}"
        )
        raise UserError(f"{where}: field {field!r} {came}, expected a list of messages. {_MEND}")
    return value


def _messages(where: str, field: str, row: dict[str, Any], *, must_answer: bool) -> list[dict[str, Any]]:
    """Messages with their contents checked; the assistant must say something where the loss is taken on it."""
    messages = _list(where, field, row)
    for number, message in enumerate(messages, start=1):
        path = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise UserError(
                f"{where}: field {path!r} holds a {type(message).__name__}, expected role and content. {_MEND}"
            )
        _string(where, "role", message, path=f"{path}.role")
        if not message.get("tool_calls"):
            _string(where, "content", message, path=f"{path}.content")
    if must_answer and not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: field {field!r} has no message of the assistant, so no answer to learn. {_MEND}")
    return messages
