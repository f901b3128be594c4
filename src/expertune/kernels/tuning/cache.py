"""The cache on disk: one JSON file per card and Triton version, which several processes may read and write at once.

A file that cannot be used is never an error for who reads it: it counts as empty, and the reason is told in words.
"""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

_FORMAT = 1
_LOCK_TIMEOUT_S = 60
Entries = dict[str, dict[str, int]]


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/expertune/tune`, or the same under `~/.cache`.

    Raises:
        RuntimeError: neither the variable nor a home folder is known.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "expertune" / "tune"


@dataclass(frozen=True, kw_only=True)
class CacheFile:
    """Tuned configurations of one card under one version of Triton.

    Args:
        folder: where it lies; made by the first writing.
        card: the card's name.
        triton: the version of Triton.
    """

    folder: Path
    card: str
    triton: str

    @property
    def path(self) -> Path:
        """Of the file."""
        name = f"{self.card} triton {self.triton} format {_FORMAT}".lower()
        return self.folder / (re.sub(r"[^a-z0-9.]+", "-", name) + ".json")

    def read(self) -> tuple[Entries, str | None]:
        """The entries by their key, and in words why the file cannot be used. No file is an empty one."""
        try:
            text = self.path.read_text(encoding="utf-8")
            data = json.loads(text)
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, RecursionError) as error:  # unreadable, not UTF-8 or JSON, nested without end
            return {}, str(error)
        if reason := self._why_foreign(data):
            return {}, reason
        return data["entries"], None

    def add(self, entries: Entries) -> None:
        """Write entries beside those that lie there already. Another process sees the file as it was or as it is.

        Raises:
            OSError: the file cannot be written, or its lock cannot be had within a minute.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT_S):
            present, _ = self.read()
            data = self._header() | {"entries": present | entries}
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.folder, delete=False) as file:
                written = Path(file.name)
                try:
                    json.dump(data, file, indent=1, sort_keys=True)
                    file.flush()
                    os.fsync(file.fileno())
                    written.replace(self.path)
                finally:
                    written.unlink(missing_ok=True)

    def _header(self) -> dict[str, Any]:
        return {"format": _FORMAT, "card": self.card, "triton": self.triton}

    def _why_foreign(self, data: Any) -> str | None:
        if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
            return "it does not hold entries"
        for name, expected in self._header().items():
            if data.get(name) != expected:
                return f"its {name} is {data.get(name)!r}, expected {expected!r}"
        return None
