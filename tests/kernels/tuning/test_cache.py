"""The cache on disk: what is damaged or foreign counts as empty and says why; writers lose nothing of each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertune.kernels.tuning.cache import CacheFile, default_folder

ENTRY = {"columns": 128, "depth": 64, "num_warps": 8, "num_stages": 3}


@pytest.fixture
def cache(tmp_path: Path) -> CacheFile:
    return CacheFile(folder=tmp_path / "tune", card="NVIDIA H200 / MIG 1g.18gb", triton="3.6.0")


def test_what_was_written_is_read_and_nothing_else_lies_there(cache: CacheFile) -> None:
    assert cache.read() == ({}, None)
    cache.add({"a": ENTRY})
    cache.add({"b": ENTRY | {"depth": 32}})
    cache.add({"a": ENTRY | {"depth": 16}})
    assert cache.read() == ({"a": ENTRY | {"depth": 16}, "b": ENTRY | {"depth": 32}}, None)
    assert cache.path.name == "nvidia-h200-mig-1g.18gb-triton-3.6.0-format-1.json"
    assert {path.suffix for path in cache.folder.iterdir()} <= {".json", ".lock"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"format": 1, "entr', "Unterminated string"),
        (b"\xff\xfe\x00", "decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "does not hold entries"),
        (b'{"entries": []}', "does not hold entries"),
        (b'{"entries": {}, "format": 2}', "its format is 2, expected 1"),
        (b'{"entries": {}, "format": 1, "card": "another"}', "its card is 'another'"),
    ],
)
def test_a_damaged_or_foreign_file_is_empty_and_is_replaced(cache: CacheFile, content: bytes, words: str) -> None:
    cache.folder.mkdir()
    cache.path.write_bytes(content)
    entries, reason = cache.read()
    assert entries == {}
    assert reason is not None
    assert words in reason
    cache.add({"a": ENTRY})
    assert cache.read() == ({"a": ENTRY}, None)


def test_another_version_of_triton_is_told_from_ours(cache: CacheFile) -> None:
    cache.add({"a": ENTRY})
    other = CacheFile(folder=cache.folder, card=cache.card, triton="3.7.0")
    assert other.read() == ({}, None)
    cache.path.replace(other.path)
    assert other.read() == ({}, "its triton is '3.6.0', expected '3.7.0'")


def test_a_file_that_cannot_be_read(cache: CacheFile) -> None:
    cache.path.mkdir(parents=True)
    entries, reason = cache.read()
    assert entries == {}
    assert reason is not None


def test_a_failed_writing_leaves_the_file_as_it_was(cache: CacheFile) -> None:
    cache.add({"a": ENTRY})
    with pytest.raises(TypeError):
        cache.add({"b": {"columns": object()}})  # type: ignore[dict-item]
    assert cache.read() == ({"a": ENTRY}, None)
    assert not list(cache.folder.glob("tmp*"))


def test_processes_that_write_at_once_lose_nothing(cache: CacheFile) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom expertune.kernels.tuning.cache import CacheFile\n"
        "folder, name = sys.argv[1:]\n"
        "cache = CacheFile(folder=Path(folder), card='card', triton='3.6.0')\n"
        "input()\n"
        "for i in range(40): cache.add({f'{name}{i}': {'depth': i}})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, cache.folder, name], stdin=subprocess.PIPE) for name in "abc"
    ]
    for writer in writers:  # all have begun by the time the first may write
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    entries, reason = CacheFile(folder=cache.folder, card="card", triton="3.6.0").read()
    assert reason is None
    assert entries == {f"{name}{i}": {"depth": i} for name in "abc" for i in range(40)}


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "expertune" / "tune"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the standard says to ignore
    assert default_folder() == Path.home() / ".cache" / "expertune" / "tune"


def test_the_file_is_json_with_its_format(cache: CacheFile) -> None:
    cache.add({"a": ENTRY})
    data = json.loads(cache.path.read_text(encoding="utf-8"))
    assert data == {"format": 1, "card": cache.card, "triton": "3.6.0", "entries": {"a": ENTRY}}
