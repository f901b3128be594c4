import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from datasets import Dataset
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

from expertune.training import files
from expertune.training.errors import UserError

ROWS = [{"prompt": "one, two\n", "completion": '"three"'}, {"prompt": "ä", "completion": "b"}]
WRITERS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    ".json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    ".csv": lambda path: pa.csv.write_csv(pa.Table.from_pylist(ROWS), path),
    ".parquet": lambda path: pa.parquet.write_table(pa.Table.from_pylist(ROWS), path),
}


def read(path: Path | str, split: str | None = None, config: str | None = None) -> list[files.Row]:
    return list(files.read_rows(str(path), split=split, default_split="train", config=config))


@pytest.mark.parametrize("suffix", WRITERS)
def test_reads(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path)
    rows = read(path)
    assert [row for _, row in rows] == ROWS
    assert all(re.fullmatch(re.escape(str(path)) + r", (line|row) \d+", where) for where, _ in rows)


def test_reads_the_files_of_a_split(tmp_path: Path) -> None:
    for name, value in {"train-2.jsonl": 2, "train-1.jsonl": 1, "test.jsonl": 3, "train.txt": 4}.items():
        (tmp_path / name).write_text(json.dumps({"text": value}))
    assert [row["text"] for _, row in read(tmp_path)] == [1, 2]
    assert [row["text"] for _, row in read(tmp_path, "test")] == [3]
    with pytest.raises(UserError, match=r"begins with 'dev'; it has test.jsonl, train-1.jsonl, train-2.jsonl"):
        read(tmp_path, "dev")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "jsonl": ("d.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"d.jsonl, line 2 is not JSON: Expecting ',' .*Mend"),
    "no object": ("d.jsonl", b'{"text": "a"}\n\n[1]\n', r"d.jsonl, line 3 holds a JSON list, expected an object"),
    "not utf-8": ("d.jsonl", b'{"text": "\xff"}\n', r"d.jsonl, line 1 is not utf-8"),
    "lines in json": ("d.json", b'{"text": "a"}\n{"text": "b"}', r"name the file .jsonl"),
    "json object": ("d.json", b'{"text": "a"}', r"d.json holds a JSON dict, expected a list"),
    "csv": ("d.csv", b"text,answer\na,b\nc\n", r"d.csv, line 3 has another number of fields than the header"),
    "csv header": ("d.csv", b"text,answer,text\na,b,c\n", r"d.csv: two columns are called text\. Rename one"),
    "csv quotes": ("d.csv", b'text\n"a\n', r"d.csv, line \d is not CSV"),
    "csv not utf-8": ("d.csv", b"text\n\xff\n", r"d.csv is not utf-8"),
    "parquet": ("d.parquet", b"no", r"d.parquet is not Parquet"),
    "too deep": ("d.jsonl", b"[" * 100_000, "d.jsonl, line 1 is nested too deeply"),
    "suffix": ("d.txt", b"text", r"none of the files that can be read: .jsonl, .json, .parquet, .csv"),
}


@pytest.mark.parametrize(("name", "content", "words"), BROKEN.values(), ids=BROKEN)
def test_names_what_is_broken(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_reads_long_cells_of_csv(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"text\n{'a' * 200_000}\n")
    limit = csv.field_size_limit()
    assert len(read(tmp_path / "d.csv")[0][1]["text"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing", "a/b/c"])
def test_refuses_what_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="there is no data at"):
        read(name)


def test_refuses_settings_of_the_hub_for_a_file(tmp_path: Path) -> None:
    WRITERS[".jsonl"](tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="no split 'train'"):
        read(tmp_path / "d.jsonl", "train")
    with pytest.raises(UserError, match="dataset_config='main'"):
        read(tmp_path / "d.jsonl", config="main")


def test_reads_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, *, split: str) -> Any:
        if name != "owner/data":
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        return Dataset.from_list([{"text": f"{config} {split}"}])

    monkeypatch.setattr(files, "load_dataset", load)
    assert read("owner/data", config="main") == [("owner/data, train, row 1", {"text": "main train"})]
    with pytest.raises(UserError, match=r"there is no file or folder 'owner/other'.*Check the name"):
        read("owner/other")


@pytest.mark.parametrize("kind", [RuntimeError, DataFilesNotFoundError, DatasetGenerationError])
def test_data_of_the_hub_that_cannot_be_read_is_told(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise kind("Dataset scripts are no longer supported")

    monkeypatch.setattr(files, "load_dataset", load)
    with pytest.raises(UserError, match="cannot be had: Dataset scripts are no longer supported Check"):
        read("owner/data")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "prompt": "b"}', r"holds an object with two values of prompt\. Keep one"),
        ('{"prompt": {"x": 1, "x": 2}}', "two values of x"),
        ('{"prompt": ' + "1" * 5000 + "}", "cannot be read: .*digits"),
    ],
)
def test_what_json_would_take_without_a_word_is_refused(tmp_path: Path, suffix: str, text: str, words: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(text if suffix == ".jsonl" else f"[{text}]")
    with pytest.raises(UserError, match=words):
        read(path)


def test_columns_of_one_name_are_refused_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pa.parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(UserError, match=r"two columns are called prompt"):
        read(path)


def test_a_row_of_csv_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e\n')
    assert [where.rpartition(" ")[2] for where, _ in read(path)] == ["2", "4"]
