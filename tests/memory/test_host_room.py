"""What is left of the host's memory, by made-up control groups."""

from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from expertune.memory.host_room import host_room

MACHINE = 1000


class _Memory(NamedTuple):
    available: int


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: _Memory(MACHINE))


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_of_a_machine_without_groups(tmp_path: Path) -> None:
    assert host_room(tmp_path) == MACHINE


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "left"),
    [("max\n", 10, 0, MACHINE), ("500\n", 200, 50, 350), ("5000\n", 10, 0, MACHINE), ("100\n", 300, 0, 0)],
)
def test_of_a_group(tmp_path: Path, limit: str, used: int, inactive: int, left: int) -> None:
    stat = f"anon 7\ninactive_file {inactive}\n"
    write(tmp_path, memory__max=limit, memory__current=f"{used}\n", memory__stat=stat)
    assert host_room(tmp_path) == left


def test_of_a_group_of_the_first_version(tmp_path: Path) -> None:
    names = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "200"}
    write(tmp_path / "memory", **names, memory__stat="inactive_file 1\ntotal_inactive_file 50\n")
    assert host_room(tmp_path) == 350
