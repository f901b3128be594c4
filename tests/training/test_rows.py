from typing import Any

import pytest

from expertune.training.errors import UserError
from expertune.training.rows import alpaca_to_prompt, detect, make_row

SHAPES = {
    "text": ["text", "id"],
    "prompt_completion": ["prompt", "completion"],
    "messages": ["messages", "tools"],
    "alpaca": ["instruction", "input", "output"],
    "sharegpt": ["conversations"],
}


@pytest.mark.parametrize(("shape", "columns"), SHAPES.items(), ids=SHAPES)
def test_detects(shape: str, columns: list[str]) -> None:
    assert detect(columns, "auto") == detect(columns, shape) == shape


def test_refuses_columns() -> None:
    with pytest.raises(
        UserError, match=r"columns question, answer, which fit none.*alpaca: instruction, output.*colum"
    ):
        detect(["question", "answer"], "auto")
    with pytest.raises(UserError, match=r"fit text and alpaca. Say which with dataset_format"):
        detect(["instruction", "output", "text"], "auto")
    with pytest.raises(UserError, match="dataset_format messages needs messages"):
        detect(["text"], "messages")
    assert detect(["instruction", "output", "text"], "alpaca") == "alpaca"


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


TALK = chat(("system", "s"), ("user", "q"), ("assistant", "a"))
KEPT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text": ("text", {"text": "a", "id": 3}, {"text": "a"}),
    "strings": ("prompt_completion", {"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "b"}),
    "lists": (
        "prompt_completion",
        {"prompt": TALK[:2], "completion": TALK[2:]},
        {"prompt": TALK[:2], "completion": TALK[2:]},
    ),
    "messages": ("messages", {"messages": TALK, "id": 1}, {"messages": TALK}),
    "tools": ("messages", {"messages": TALK, "tools": "[]"}, {"messages": TALK, "tools": "[]"}),
    "tools of lists": (
        "prompt_completion",
        {"prompt": TALK[:2], "completion": TALK[2:], "tools": "[]"},
        {"prompt": TALK[:2], "completion": TALK[2:], "tools": "[]"},
    ),
    "tools and system of sharegpt": (
        "sharegpt",
        {
            "system": "s",
            "tools": "[]",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        {"messages": TALK, "tools": "[]"},
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "i", "output": "o", "input": None},
        {"instruction": "i", "input": "", "output": "o"},
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "q"), ("gpt", "a"))]},
        {"messages": TALK},
    ),
}


@pytest.mark.parametrize(("shape", "row", "expected"), KEPT.values(), ids=KEPT)
def test_keeps_what_the_shape_needs(shape: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert make_row(shape, "here", row) == expected


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "two systems": (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "system", "value": "t"}, {"from": "gpt", "value": "a"}]},
        "both field 'system' and the first turn are the system's",
    ),
    "no answer": ("prompt_completion", {"prompt": "a"}, "field 'completion' is missing"),
    "null answer": ("alpaca", {"instruction": "a", "output": None}, "field 'output' is missing"),
    "empty answer": ("prompt_completion", {"prompt": "a", "completion": " "}, "field 'completion' is empty"),
    "half an emoji": ("text", {"text": "a\ud83d"}, "field 'text' holds half a character"),
    "half an emoji in a call": (
        "messages",
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "\ud83d"}}]}]},
        "holds half a character",
    ),
    "a number": ("text", {"text": 3}, "field 'text' holds a int, expected a string"),
    "input a list": ("alpaca", {"instruction": "a", "output": "b", "input": []}, "field 'input' holds a list"),
    "no messages": ("messages", {"messages": []}, "field 'messages' is empty"),
    "text for messages": ("messages", {"messages": "hi"}, "field 'messages' holds a str"),
    "no role": ("messages", {"messages": [{"content": "a"}]}, r"'messages\[1\].role' is missing"),
    "no content": ("messages", {"messages": chat(("user", None))}, r"'messages\[1\].content' is missing"),
    "not a message": ("messages", {"messages": ["hi"]}, r"'messages\[1\]' holds a str"),
    "nobody answers": ("messages", {"messages": TALK[:2]}, "no message of the assistant"),
    "mixed": ("prompt_completion", {"prompt": TALK, "completion": "a"}, "field 'completion' holds a str"),
    "unknown speaker": ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, r"\[1\].from' is 'bot'"),
    "no value": ("sharegpt", {"conversations": [{"from": "gpt"}]}, r"'conversations\[1\].value' is missing"),
    "a turn of text": ("sharegpt", {"conversations": ["hi"]}, r"'conversations\[1\]' holds a str"),
    "nobody replies": ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no message of the assistant"),
}


@pytest.mark.parametrize(("shape", "row", "words"), WRONG.values(), ids=WRONG)
def test_names_the_row_and_the_field(shape: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^data.jsonl, line 7: .*{words}.*(Mend|expected)"):
        make_row(shape, "data.jsonl, line 7", row)


def test_a_call_of_a_tool_needs_no_content() -> None:
    messages = [*TALK[:2], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert make_row("messages", "here", {"messages": messages}) == {"messages": messages}


def test_alpaca_with_and_without_a_chat_template() -> None:
    row = {"instruction": "Add.", "input": "1+1", "output": "2"}
    assert alpaca_to_prompt(row, chat=True) == {
        "prompt": chat(("user", "Add.\n\n1+1")),
        "completion": chat(("assistant", "2")),
    }
    assert alpaca_to_prompt(row, chat=False) == {
        "prompt": "### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n",
        "completion": "2",
    }
    assert "Input" not in alpaca_to_prompt({**row, "input": ""}, chat=False)["prompt"]
