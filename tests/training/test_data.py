import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from expertune.training import files
from expertune.training.data import Rows, read_data, to_dataset
from expertune.training.errors import UserError
from expertune.training.exact_json import as_it_was, given_back_by
from expertune.training.recipe_file import make_recipe
from tests.training.conftest import CHAT, make_tokenizer

TEXTS = [{"text": str(i)} for i in range(20)]


def read(path: Path, **fields: Any) -> tuple[Rows, Rows | None]:
    return read_data(make_recipe({"model_name_or_path": "m", "output_dir": "o", "dataset_name": str(path)} | fields))


def test_renames_columns(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"question": "q", "answer": "a"}])
    rows, _ = read(path, columns={"question": "prompt", "answer": "completion"})
    assert (rows.shape, rows.values, rows.where) == (
        "prompt_completion",
        ({"prompt": "q", "completion": "a"},),
        (f"{path}, line 1",),
    )


CHAT_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "rest"),
    [
        (CHAT_ROW | {"tools": None}, []),
        (CHAT_ROW | {"system": "be brief"}, ["system"]),
        (
            {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]], "id": 3, "note": ""},
            ["history", "id"],
        ),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, ["tools"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be brief"}, []),
    ],
)
def test_columns_that_are_not_trained_on_are_known(
    write_rows: Callable[..., Path], row: dict[str, Any], rest: list[str]
) -> None:
    rows, _ = read(write_rows([row]))
    assert list(rows.unread) == rest


@pytest.mark.parametrize(("eval_size", "num_eval"), [(5, 5), (0.25, 5), (0.01, 1)])
def test_holds_out_rows(eval_size: float, num_eval: int, write_rows: Callable[..., Path]) -> None:
    path = write_rows(TEXTS)
    train, held_out = read(path, eval_size=eval_size)
    assert held_out is not None
    assert (len(train), len(held_out)) == (20 - num_eval, num_eval)
    assert sorted(map(str, (*train.values, *held_out.values))) == sorted(map(str, TEXTS))
    for rows in (train, held_out):
        for value, where in zip(rows.values, rows.where, strict=True):
            assert where == f"{path}, line {int(value['text']) + 1}"
    assert read(path, eval_size=eval_size) == (train, held_out)
    assert read(path, eval_size=eval_size, seed=1) != (train, held_out)


def test_evaluates_on_other_data(write_rows: Callable[..., Path]) -> None:
    train, held_out = read(write_rows(TEXTS), eval_dataset_name=str(write_rows(TEXTS[:3], "test.jsonl")))
    assert held_out is not None
    assert (len(train), len(held_out)) == (20, 3)


def test_settings_of_the_hub_are_for_data_of_the_hub(
    write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside which a file may stand."""

    def load(_name: str, config: str | None, *, split: str) -> Any:
        return Dataset.from_list([{"text": f"{config} {split}"}])

    monkeypatch.setattr(files, "load_dataset", load)
    path = write_rows(TEXTS)
    train, held_out = read(path, eval_dataset_name="owner/data", dataset_config="main")
    assert held_out is not None
    assert (len(train), held_out.values) == (20, ({"text": "main test"},))
    train, held_out = read(Path("owner/data"), eval_dataset_name=str(path), dataset_config="main")
    assert held_out is not None
    assert (train.values, len(held_out)) == (({"text": "main train"},), 20)
    with pytest.raises(UserError, match="dataset_config='main' is for hub data sets"):
        read(path, eval_dataset_name=str(path), dataset_config="main")


def test_tools_that_the_first_row_has_not_are_kept() -> None:
    messages = [{"role": "assistant", "content": "a"}]
    both = ({"messages": messages}, {"messages": messages, "tools": "[]"})
    dataset = to_dataset(Rows(shape="messages", values=both, where=("1", "2")), make_tokenizer(CHAT))
    assert dataset["tools"][:] == [None, "[]"]


def test_calls_of_tools_keep_their_own_arguments() -> None:
    """Of one type for all rows, each would have the arguments of all, which are null where it has none."""

    def row(arguments: Any, tools: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}

    rows = (
        row({"x": 1}, [{"name": "f", "parameters": {"x": {"type": "int"}}}]),
        row({"y": "2", "z": None}, [{"name": "g", "parameters": {"y": {"enum": ["2"]}}}]),
        row({"x": [3]}, None),
    )
    dataset = to_dataset(Rows(shape="messages", values=rows, where=("1", "2", "3")), make_tokenizer(CHAT))
    assert as_it_was(list(dataset)) == list(rows)


def test_numbers_of_calls_and_tools_reach_the_template_digit_for_digit() -> None:
    """A table rounds them where rows differ, and refuses whole numbers of more than 64 bits."""
    numbers = [52.52000681234568, 12.3, 1e-12, 0.1 + 0.2, 2**70, -3, 1e300, True, None, "1.5", "[", "\ue0001"]
    calls = [{"function": {"name": "f", "arguments": {f"x{i}": number}}} for i, number in enumerate(numbers)]
    rows = tuple(
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [{"least": number}]}
        for call, number in zip(calls, numbers, strict=True)
    )
    template = "{{ tools | tojson }} {{ messages[0].tool_calls | tojson }}"
    tokenizer = make_tokenizer(template)
    dataset = to_dataset(Rows(shape="messages", values=rows, where=tuple(map(str, numbers))), tokenizer)
    with given_back_by(tokenizer):
        for row, read in zip(rows, dataset, strict=True):
            text = tokenizer.apply_chat_template(read["messages"], tools=read["tools"], tokenize=False)
            expected = [row["tools"], row["messages"][0]["tool_calls"]]
            assert text == " ".join(json.dumps(each, ensure_ascii=False) for each in expected)
    assert "apply_chat_template" not in vars(tokenizer)


def test_evaluates_on_the_same_shape_only(write_rows: Callable[..., Path]) -> None:
    talk = str(write_rows([{"messages": [{"role": "assistant", "content": "a"}]}], "test.jsonl"))
    with pytest.raises(UserError, match=r"holds messages, but .* text\. Give both"):
        read(write_rows(TEXTS), eval_dataset_name=talk)


def test_refuses(write_rows: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        read(write_rows([]))
    with pytest.raises(UserError, match="hold out 20 of 20 rows"):
        read(write_rows(TEXTS), eval_size=20)
    with pytest.raises(UserError, match="columns names question, but the data has the columns text"):
        read(write_rows(TEXTS), columns={"question": "text"})
    with pytest.raises(UserError, match=r"line 1: after .* two columns of the data are called text"):
        read(write_rows([{"a": "1", "text": "2"}]), columns={"a": "text"})
    with pytest.raises(UserError, match=r"line 2: after .* two columns of the data are called tools"):
        read(write_rows([{"a": "1", "text": "2"}, {"a": "1", "text": "2", "tools": "3"}]), columns={"a": "tools"})
    strings, messages = {"prompt": "q", "completion": "a"}, [{"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="line 2: field 'prompt' holds a list, but the rows before it a str"):
        read(write_rows([strings, {"prompt": messages, "completion": messages}]))


def rows(shape: str, value: dict[str, Any]) -> Rows:
    return Rows(shape=shape, values=(value,), where=("here",))


def test_alpaca_needs_no_chat_template() -> None:
    alpaca = rows("alpaca", {"instruction": "i", "input": "", "output": "o"})
    assert to_dataset(alpaca, make_tokenizer())[0]["completion"] == "o"
    assert to_dataset(alpaca, make_tokenizer(CHAT))[0]["completion"] == [{"role": "assistant", "content": "o"}]


def test_conversations_need_a_chat_template() -> None:
    talk = rows("messages", {"messages": [{"role": "assistant", "content": "a"}]})
    assert to_dataset(talk, make_tokenizer(CHAT)).column_names == ["messages"]
    with pytest.raises(UserError, match=r"no chat template. Set chat_template_path"):
        to_dataset(talk, make_tokenizer())


def test_strings_need_an_end() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        to_dataset(rows("text", {"text": "a"}), tokenizer)
