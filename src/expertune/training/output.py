"""The folder a run writes: claimed before, never half-written, and nobody else's files touched.

A state file lists every file that a run wrote, so that a later one, told to overwrite, replaces those and no others:
they are moved aside, and removed when that run has finished.
Folders of weights are written beside their place and renamed: a killed run leaves no half adapter that looks whole.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import expertune
from expertune.training.errors import UserError

STATE_FILE = "expertune_run.json"
_PARTIAL = ".partial-"
_EARLIER = "earlier-run-"
# What a run may write there, beside its state: of these names it finds nobody else's.
_ITS_OWN = ("adapter", "model", "checkpoint-*", "loss.png", "metrics.jsonl", "recipe.yaml")


class OutputFolder:
    """One run's folder.

    Args:
        path: of the folder.
        overwrite: replace what an earlier run wrote there.
        reads: what this run reads, by the name of the setting; names that are no paths do no harm.

    Raises:
        UserError: the folder cannot be written, it holds an earlier run and `overwrite` is false, it holds files of
            somebody else, or this run reads what would be replaced.
    """

    def __init__(self, path: str | Path, *, overwrite: bool, reads: Mapping[str, str | None] | None = None) -> None:
        self.path = Path(path).expanduser()
        self._reads = {name: Path(read) for name, read in (reads or {}).items() if read is not None}
        self._wrote: list[str] = []
        self._aside: list[str] = []  # files of earlier runs, until this one has finished
        self._started = ""
        try:
            self._check_place()
            self._earlier = self._check(overwrite=overwrite)
        except OSError as error:
            raise self._unwritable(str(error.strerror)) from error

    @contextmanager
    def never_left_empty(self) -> Iterator[None]:
        """Around what may make the folder before it is claimed, as Transformers' trainer does, and then be refused."""
        missing = [path for path in self._upwards() if not path.exists()]
        try:
            yield
        finally:
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def claim(self) -> None:
        """Make the folder, move aside what an earlier run wrote there, and mark it as a run that has not finished."""
        self._started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._move_aside()
            self._write_state("running")
        except OSError as error:
            raise self._unwritable(str(error.strerror)) from error

    @property
    def aside(self) -> list[Path]:
        """The folders in which earlier runs lie until this one has finished."""
        return sorted({self.path / name.partition("/")[0] for name in self._aside})

    def _move_aside(self) -> None:
        for partial in self.path.glob(f"{_PARTIAL}*"):
            shutil.rmtree(partial)
        names = [name for name in self._earlier if (self.path / name).is_file()]
        if not names:
            return
        aside = next(each for n in count(1) if not (each := self.path / f"{_EARLIER}{n}").exists())
        aside.mkdir()
        shutil.copy2(self.path / STATE_FILE, aside / STATE_FILE)
        names = [name for name in names if name != STATE_FILE]
        # before anything is moved: if that fails on the way, what is here and what is there is known to be a run's
        self._aside += [f"{aside.name}/{name}" for name in (STATE_FILE, *names)]
        self._record(names)
        for name in names:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).rename(aside / name)
        self._wrote = []
        self._remove_empty_folders(names)

    def _remove_empty_folders(self, names: Iterable[str]) -> None:
        """Those of files that are gone, and the folders around them."""
        folders = {self.path / parent for name in names for parent in Path(name).parents} - {self.path}
        for folder in sorted(folders, reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def file(self, name: str) -> Path:
        """The path of a file to write, which then counts as this run's."""
        self._record([name])
        return self.path / name

    def write_folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """A folder that is there whole or not at all.

        Args:
            name: of the folder, new in this run.
            write: fills the empty folder that it is given.
        """
        partial = self.path / f"{_PARTIAL}{name}"
        partial.mkdir()
        write(partial)
        files = [file.relative_to(partial).as_posix() for file in sorted(partial.rglob("*")) if file.is_file()]
        self._record([f"{name}/{file}" for file in files])
        return partial.rename(self.path / name)

    def finish(self) -> None:
        """Mark the run as finished, and remove the earlier ones that it replaces."""
        self._write_state("finished")
        for name in self._aside:
            (self.path / name).unlink(missing_ok=True)
        self._remove_empty_folders(self._aside)
        self._aside = []
        self._write_state("finished")

    def _upwards(self) -> tuple[Path, ...]:
        return (self.path, *self.path.parents)

    def _unwritable(self, reason: str) -> UserError:
        return UserError(f"output_dir {str(self.path)!r} cannot be written: {reason}. Choose another.")

    def _check_place(self) -> None:
        """Ask what is there already, and make nothing."""
        there = next(path for path in self._upwards() if path.exists() or path.is_symlink())
        if there.is_dir():
            if not os.access(there, os.W_OK | os.X_OK):
                raise self._unwritable(f"there is no right to write into {str(there)!r}")
        elif there == self.path:
            raise UserError(f"output_dir {str(self.path)!r} is a file. Choose a folder.")
        else:
            raise self._unwritable(f"{str(there)!r} is a file")

    def _check(self, *, overwrite: bool) -> list[str]:
        """The files of an earlier run that `claim` may move aside."""
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return []
        state = self._read_state()
        if state is None:
            raise UserError(
                f"output_dir {str(self.path)!r} holds files that expertune did not write. Choose a new or empty folder."
            )
        if not overwrite:
            kind = "a finished run" if state["status"] == "finished" else "a half-written run, which did not finish,"
            raise UserError(
                f"output_dir {str(self.path)!r} holds {kind} of {state['started']}. Choose another folder, or set "
                "overwrite_output_dir=true to replace it."
            )
        for name, read in self._reads.items():
            if read.exists() and read.resolve().is_relative_to(self.path.resolve()):
                raise UserError(
                    f"output_dir {str(self.path)!r} is not overwritten: this run reads {name}={str(read)!r}, which "
                    "lies in it. Choose another output_dir."
                )
        earlier: list[str] = state["wrote"]
        self._aside = state["aside"]
        folders = {name.partition("/")[0] for name in earlier if "/" in name}
        folders |= {entry.name for entry in self.path.iterdir() if _is_its_own(entry.name)}
        there = (file for folder in folders for file in _files_in(self.path / folder))
        if strange := sorted({file.relative_to(self.path).as_posix() for file in there} - set(earlier)):
            raise UserError(
                f"output_dir {str(self.path)!r} is not overwritten: {', '.join(strange[:3])} lie among the files of "
                "a run, but the earlier run did not write them. Move them away, or choose another folder."
            )
        return earlier

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(state, dict) or not {"status", "started", "wrote"} <= state.keys():
            return None
        for key in ("wrote", "aside"):  # paths out of the folder are none that a run wrote
            names = map(Path, state.get(key, []))
            state[key] = [name.as_posix() for name in names if ".." not in name.parts and not name.is_absolute()]
        return state

    def _record(self, names: list[str]) -> None:
        self._wrote = list(dict.fromkeys((*self._wrote, *names)))
        self._write_state("running")

    def _write_state(self, status: str) -> None:
        state = {
            "expertune": expertune.__version__,
            "status": status,
            "started": self._started,
            "wrote": [STATE_FILE, *self._wrote],
            "aside": self._aside,
        }
        partial = self.path / f"{STATE_FILE}.partial"
        partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path / STATE_FILE)


def _is_its_own(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _ITS_OWN)


def _files_in(path: Path) -> list[Path]:
    """All in a folder, or the file itself."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
