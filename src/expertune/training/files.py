"""Rows out of a file, folder or hub dataset, each with the place it came from.

    data.jsonl, line 7  ->  {"question": "...", "answer": "..."}

Files are read here rather than by `datasets`, which names neither file nor line of a row that it cannot read.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from expertune.training.errors import UserError, one_paragraph

_LONGEST_CELL = 2**31 - 1  # of a CSV file; Python's own limit is 131,072 characters

Row = tuple[str, dict[str, Any]]
"""Where a row came from, in words, and its values by column name."""


def read_rows(name: str, *, split: str | None, default_split: str, config: str | None) -> Iterator[Row]:
    """Each row of a data set.

    Args:
        name: a file, a folder, or a hub id.
        split: of a hub data set; in a folder, what the file names begin with. A single file has none.
        default_split: where `split` is None.
        config: of a hub data set.

    Raises:
        UserError: nothing is there, or a row cannot be read; names the row.
    """
    path = Path(name)
    if path.is_file() or path.is_dir():
        if config is not None:
            raise UserError(f"dataset_config={config!r} is for hub data sets, but {name!r} is on this disk. Drop it.")
        if path.is_file() and split is not None:
            raise UserError(f"{name!r} is a single file and has no split {split!r}. Drop the split.")
        for file in [path] if path.is_file() else _files_in(path, split or default_split):
            yield from _reader(file)(file)
    elif path.suffix in _READERS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"there is no data at {name!r}, looked for from {Path.cwd()}. Check the path.")
    else:
        yield from _read_hub(name, split or default_split, config)


def names_twice(names: Iterable[str]) -> list[str]:
    """The names that are there more than once."""
    return [name for name, times in Counter(names).items() if times > 1]


def _files_in(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in _READERS)
    chosen = [file for file in files if file.name.startswith(split)]
    if not chosen:
        seen = ", ".join(file.name for file in files) or f"no file of {', '.join(_READERS)}"
        raise UserError(
            f"no data file in {str(folder)!r} begins with {split!r}; it has {seen}. Name the file itself, or set "
            "dataset_train_split or dataset_test_split to how its name begins."
        )
    return chosen


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    if file.suffix not in _READERS:
        raise UserError(f"{str(file)!r} is none of the files that can be read: {', '.join(_READERS)}. Convert it.")
    return _READERS[file.suffix]


def _read_json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _object(where, _json(where, line.rstrip()))


def _read_json(file: Path) -> Iterator[Row]:
    rows = _json(str(file), file.read_bytes())
    if not isinstance(rows, list):
        raise UserError(f"{file} holds a JSON {type(rows).__name__}, expected a list of objects, one a row.")
    for number, row in enumerate(rows, start=1):
        where = f"{file}, row {number}"
        yield where, _object(where, row)


def _json(where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=partial(_object_of, where))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not utf-8: {error}. Save the file as utf-8.") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply to be read. Mend or remove it.") from error
    except json.JSONDecodeError as error:
        is_lines = error.msg == "Extra data"
        hint = "It looks like one object a line: name the file .jsonl." if is_lines else "Mend or remove it."
        raise UserError(
            f"{where} is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}. {hint}"
        ) from error
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{where} cannot be read: {error}. Mend or remove it.") from error


def _object_of(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = names_twice(name for name, _ in pairs)
        raise UserError(f"{where} holds an object with two values of {', '.join(twice)}. Keep one.")
    return found


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a JSON {type(row).__name__}, expected an object with a key a column. Mend it.")
    return row


def _read_csv(file: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            _refuse_columns_twice(file, reader.fieldnames or ())
            last = reader.line_num
            for row in reader:
                where, last = f"{file}, line {last + 1}", reader.line_num  # a quoted cell may span lines
                if None in row or None in row.values():
                    raise UserError(
                        f"{where} has another number of fields than the header, {reader.fieldnames}. Mend or remove it."
                    )
                yield where, row
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num} is not CSV: {error}. Mend or remove it.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not utf-8: {error}. Save it as utf-8.") from error
        finally:
            csv.field_size_limit(limit)


def _refuse_columns_twice(file: Path, names: Iterable[str]) -> None:
    if twice := names_twice(names):
        raise UserError(f"{file}: two columns are called {', '.join(twice)}. Rename one.")


def _read_parquet(file: Path) -> Iterator[Row]:
    number = 0
    try:
        table = pq.ParquetFile(file)
        _refuse_columns_twice(file, table.schema_arrow.names)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{file} is not Parquet: {error}. Write it again.") from error


def _read_hub(name: str, split: str, config: str | None) -> Iterator[Row]:
    try:
        rows = load_dataset(name, config, split=split)
    except (DatasetsError, ValueError, ConnectionError, RuntimeError) as error:  # of all kinds, by what is wrong
        raise UserError(
            f"there is no file or folder {name!r} in {Path.cwd()}, and as a data set of the hub it cannot be had: "
            f"{one_paragraph(error)} Check the name, dataset_config and the split ({split!r})."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, {split}, row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
