import json
import os
from pathlib import Path

import pytest

from expertune.training.errors import UserError
from expertune.training.output import STATE_FILE, OutputFolder


def fill(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "weights").write_text("new")
    (path / "config").write_text("new")


def run(path: Path, *, overwrite: bool = False, finish: bool = True, adapter: str = "adapter") -> OutputFolder:
    folder = OutputFolder(path, overwrite=overwrite)
    folder.claim()
    folder.file("metrics.jsonl").write_text("new")
    folder.write_folder(adapter, fill)
    if finish:
        folder.finish()
    return folder


def files(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


WRITTEN = {STATE_FILE, "metrics.jsonl", "adapter/config", "adapter/sub/weights"}


def test_lists_what_it_wrote(tmp_path: Path) -> None:
    run(tmp_path / "a" / "b")
    assert files(tmp_path / "a" / "b") == WRITTEN
    state = json.loads((tmp_path / "a" / "b" / STATE_FILE).read_text())
    assert (state["status"], set(state["wrote"])) == ("finished", WRITTEN)


@pytest.mark.parametrize("reads", ["adapter", "adapter/sub", ".", "metrics.jsonl"])
def test_never_replaces_what_this_run_reads(reads: str, tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=r"this run reads model_name_or_path=.*Choose another output_dir"):
        OutputFolder(tmp_path, overwrite=True, reads={"model_name_or_path": str(tmp_path / reads)})
    assert files(tmp_path) == WRITTEN
    elsewhere = {"model_name_or_path": "owner/model", "dataset_name": str(tmp_path.parent), "chat_template_path": None}
    OutputFolder(tmp_path, overwrite=True, reads=elsewhere)


def test_looking_writes_nothing(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("finish", "words"), [(True, "holds a finished run"), (False, "holds a half-written run")])
def test_refuses_an_earlier_run(finish: bool, words: str, tmp_path: Path) -> None:
    run(tmp_path, finish=finish)
    with pytest.raises(UserError, match=f"{words}.*overwrite_output_dir=true"):
        OutputFolder(tmp_path, overwrite=False)
    assert files(tmp_path) == WRITTEN


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("state", [None, "{", "[]", "{}"])
def test_never_touches_a_foreign_folder(overwrite: bool, state: str | None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    if state is not None:
        (tmp_path / STATE_FILE).write_text(state)
    with pytest.raises(UserError, match="files that expertune did not write"):
        OutputFolder(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_overwrites_only_what_a_run_wrote(tmp_path: Path) -> None:
    run(tmp_path, adapter="checkpoint-5")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, overwrite=True)
    assert files(tmp_path) == WRITTEN | {"notes.txt"}
    assert not (tmp_path / "checkpoint-5").exists()


@pytest.mark.parametrize("num_failed", [1, 2])
def test_what_is_replaced_is_there_until_the_run_has_finished(tmp_path: Path, num_failed: int) -> None:
    run(tmp_path)
    (tmp_path / "adapter" / "config").write_text("the first")
    for number in range(num_failed):
        failed = run(tmp_path, overwrite=True, finish=False)
        assert failed.aside == [tmp_path / f"earlier-run-{n + 1}" for n in range(number + 1)]
        assert files(tmp_path / "earlier-run-1") == WRITTEN
        assert (tmp_path / "earlier-run-1" / "adapter" / "config").read_text() == "the first"
    (tmp_path / "earlier-run-1" / "notes.txt").write_text("mine")
    assert run(tmp_path, overwrite=True).aside == []
    assert files(tmp_path) == WRITTEN | {"earlier-run-1/notes.txt"}
    assert run(tmp_path, overwrite=True).aside == []


def test_refuses_to_overwrite_files_among_its_own(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"adapter/notes.txt lie among the files"):
        OutputFolder(tmp_path, overwrite=True)
    assert files(tmp_path) == WRITTEN | {"adapter/notes.txt"}


def test_does_not_follow_a_state_file_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    run(tmp_path / "out")
    state = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    state["wrote"] += ["../mine", str(tmp_path / "mine")]
    (tmp_path / "out" / STATE_FILE).write_text(json.dumps(state))
    OutputFolder(tmp_path / "out", overwrite=True).claim()
    assert (tmp_path / "mine").exists()


def test_a_killed_save_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    def killed(path: Path) -> None:
        fill(path)
        raise KeyboardInterrupt

    folder = OutputFolder(tmp_path, overwrite=False)
    folder.claim()
    with pytest.raises(KeyboardInterrupt):
        folder.write_folder("adapter", killed)
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(UserError, match="half-written"):
        OutputFolder(tmp_path, overwrite=False)
    run(tmp_path, overwrite=True)
    assert files(tmp_path) == WRITTEN


def test_a_run_that_cannot_be_replaced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, overwrite=False)
    folder = OutputFolder(tmp_path, overwrite=True)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        folder.claim()


def test_refuses_a_file_and_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        OutputFolder(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"cannot be written: '.*file' is a file\. Choose another"):
        OutputFolder(tmp_path / "file" / "out" / "in", overwrite=True)
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        OutputFolder(tmp_path / ("o" * 300), overwrite=True)
    assert files(tmp_path) == {"file"}


def test_refuses_a_folder_where_it_has_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []  # a test may run as root, who has every right
    monkeypatch.setattr(os, "access", lambda path, _mode: asked.append(path))
    with pytest.raises(UserError, match=r"cannot be written: there is no right to write into"):
        OutputFolder(tmp_path / "new" / "out", overwrite=True)
    assert asked == [tmp_path]


def test_a_folder_that_was_made_too_early_is_not_left_empty(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    folder = OutputFolder(out, overwrite=True)
    with pytest.raises(UserError), folder.never_left_empty():
        out.mkdir(parents=True)
        raise UserError("refused")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    with OutputFolder(tmp_path / "there", overwrite=True).never_left_empty():
        pass
    assert (tmp_path / "there").exists()
    with folder.never_left_empty():
        folder.claim()
    assert files(out) == {STATE_FILE}


@pytest.mark.parametrize("name", ["adapter/notes.txt", "loss.png", "checkpoint-7/weights", "recipe.yaml"])
def test_refuses_to_overwrite_what_lies_where_it_would_write(tmp_path: Path, name: str) -> None:
    """As where an earlier run was killed before its first save, and somebody has used its folder since."""
    folder = OutputFolder(tmp_path, overwrite=False)
    folder.claim()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} lie among the files of a run, but the earlier run did not write"):
        OutputFolder(tmp_path, overwrite=True)
    assert files(tmp_path) == {STATE_FILE, name}


def test_a_run_that_could_be_moved_in_part_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if "weights" in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    folder = OutputFolder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        folder.claim()
    assert folder.aside == [tmp_path / "earlier-run-1"]
    monkeypatch.undo()
    run(tmp_path, overwrite=True)
    assert files(tmp_path) == WRITTEN


def test_what_an_interrupt_keeps_from_being_removed_is_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    folder = run(tmp_path, overwrite=True, finish=False)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.finish()
    monkeypatch.undo()
    run(tmp_path, overwrite=True)
    assert files(tmp_path) == WRITTEN
