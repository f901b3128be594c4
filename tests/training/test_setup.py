"""Folders of models that cannot be loaded: told in words, and our own bugs keep their traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertune import api
from expertune.training.errors import UserError
from expertune.training.recipe import Recipe
from expertune.training.setup import load_model

Make = Callable[..., Recipe]


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def empty_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_bytes(b"")


def misshapen(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})


def an_expert_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if ".experts." in name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        before = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(before | fields))

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (cut, r"\(SafetensorError: .*fetch it again"),
    "no weights in the file": (empty, r"\(SafetensorError: .*fetch it again"),
    "no weights in the pickle": (empty_pickle, r"\(EOFError: .*fetch it again"),
    "misshapen weights": (misshapen, r"\(RuntimeError: .*config.json does not fit"),
    "an expert missing": (an_expert_missing, r"\(RuntimeError: .*config.json does not fit"),
    "unknown dtype": (config(dtype="bfloat17"), r"\(AttributeError: .*bfloat17"),
    "a text for a number": (config(hidden_size="64"), "got str"),
    "unknown rope": (config(rope_parameters={"rope_type": "nope"}), r"nope"),
    "a package missing": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        "compressed-tensors.*Install what it needs",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_told(
    break_it: Callable[[Path], None], words: str, make: Make, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(make_base(), tmp_path / "model")
    break_it(folder)
    with pytest.raises(UserError, match=rf"^model_name_or_path '{folder}' cannot be loaded .*{words}"):
        load_model(make(model_name_or_path=str(folder), dtype="auto"))


def test_a_missing_tokenizer_is_told(make: Make, make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(make_base(), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=r"has no tokenizer: .*tokenizer.json"):
        load_model(make(model_name_or_path=str(folder)))


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, KeyError])
def test_a_bug_of_ours_is_no_error_of_the_folder(
    kind: type[Exception], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def optimize(*_args: Any, **_kwargs: Any) -> None:
        raise kind("a bug")

    monkeypatch.setattr(api, "optimize", optimize)
    with pytest.raises(kind, match="a bug"):
        load_model(make())
