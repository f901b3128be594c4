"""What a launcher gets: the tuned configuration where it fits, the shipped one in every other case."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import expertune
from expertune.kernels.tuning import lookup
from expertune.kernels.tuning.configs import LinearConfig, LinearShape, ShrinkConfig, ShrinkShape
from expertune.kernels.tuning.lookup import Key, TunedConfigs
from tests.cases import DEVICE, needs_kernels
from tests.conftest import Checkpoint
from tests.hosts.models import load_tiny

CPU = torch.device("cpu")
SHAPE = LinearShape(64, 32, 8, True)
KEY = Key(SHAPE, CPU, torch.float32, 32)
SHIPPED, TUNED = LinearConfig(32, 16, 4, 2), LinearConfig(16, 32, 4, 2)


def ask(configs: TunedConfigs, num_rows: int = 12, num_experts: int = 4) -> Any:
    return configs.config(SHAPE, CPU, torch.float32, num_rows, num_experts)


def test_the_shipped_configuration_and_then_the_tuned_one(tmp_path: Path) -> None:
    first = TunedConfigs(tmp_path)
    assert ask(first) == SHIPPED
    assert "shipped configurations" in first.status(CPU)
    first.keep(KEY, TUNED)
    assert ask(first) == SHIPPED, "a process must not change its configurations on its way"
    second = TunedConfigs(tmp_path)
    assert ask(second) == TUNED
    assert second.status(CPU) == f"tuned configurations: 1, from {second.file(CPU).path}"
    assert list(second.answers().items()) == [(KEY, TUNED)]


def test_two_kernels_of_the_same_numbers_are_two(tmp_path: Path) -> None:
    """A linear without LoRA from 24 to 16, and a product with a factor of rank 16 of rows of 24."""
    configs = TunedConfigs(tmp_path)
    for shape, kind in ((LinearShape(24, 16, 0, True), LinearConfig), (ShrinkShape(24, 16, False, True), ShrinkConfig)):
        assert type(configs.config(shape, CPU, torch.float32, 12, 4)) is kind
    assert len(configs.answers()) == 2


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "bucket"),
    [(1, 128, 32), (128, 4, 32), (129, 4, 64), (256, 4, 64), (257, 4, 128), (4096, 4, 1024), (9999, 4, 2048)],
)
def test_buckets_of_rows_an_expert(tmp_path: Path, num_rows: int, num_experts: int, bucket: int) -> None:
    configs = TunedConfigs(tmp_path)
    ask(configs, num_rows, num_experts)
    assert [key.bucket for key in configs.answers()] == [bucket]


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(bucket=64),
        KEY._replace(dtype=torch.float16),
        KEY._replace(shape=replace(SHAPE, rank=16)),
        KEY._replace(shape=replace(SHAPE, is_k_contiguous=False)),
        KEY._replace(shape=replace(SHAPE, width_in=32, width_out=64)),
    ],
    ids=str,
)
def test_what_was_tuned_for_another_key_is_not_taken(tmp_path: Path, other: Key) -> None:
    TunedConfigs(tmp_path).keep(other, TUNED)
    assert ask(TunedConfigs(tmp_path)) == SHIPPED


def test_a_changed_kernel_is_tuned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TunedConfigs(tmp_path / "cache").keep(KEY, TUNED)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for name in ("linear.py", "shrink.py"):
        shutil.copy(lookup._KERNELS / name, kernels)
    monkeypatch.setattr(lookup, "_KERNELS", kernels)
    assert ask(TunedConfigs(tmp_path / "cache")) == TUNED
    with (kernels / "linear.py").open("a") as file:
        file.write("# changed\n")
    changed = TunedConfigs(tmp_path / "cache")
    assert ask(changed) == SHIPPED
    assert "shipped configurations" in changed.status(CPU)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"columns": 16, "depth": 32, "num_warps": 4}, "damaged"),
        ({"columns": "16", "depth": 32, "num_warps": 4, "num_stages": 2}, "damaged"),
        ({"columns": 16, "depth": True, "num_warps": 4, "num_stages": 2}, "damaged"),
        ([16, 32, 4, 2], "damaged"),
        (None, "damaged"),
        ({"columns": 48, "depth": 32, "num_warps": 4, "num_stages": 2}, "columns must be a power of two"),
        ({"columns": 1 << 40, "depth": 32, "num_warps": 4, "num_stages": 2}, "columns must be from 16 to 1024"),
    ],
)
def test_an_entry_that_cannot_be_used(tmp_path: Path, entry: Any, words: str) -> None:
    configs = TunedConfigs(tmp_path)
    configs.file(CPU).add({KEY.text(): entry})
    for _ in range(3):
        assert ask(configs) == SHIPPED
    assert configs.status(CPU).count(words) == 1, "told once"


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    configs = TunedConfigs(tmp_path)
    configs.file(CPU).path.write_text("{")
    assert ask(configs) == SHIPPED
    assert configs.config(ShrinkShape(64, 8, True, True), CPU, torch.float32, 12, 4) == ShrinkConfig(128, 64, 4, 3)
    assert str(configs.file(CPU).path) in configs.status(CPU)
    assert configs.status(CPU).count("cannot be used") == 1


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    configs = TunedConfigs()
    assert ask(configs) == SHIPPED
    assert "home directory" in configs.status(CPU)


def test_the_disk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = TunedConfigs(tmp_path)
    ask(configs)
    monkeypatch.setattr(configs, "_read", None)
    monkeypatch.setattr(configs, "_find", None)
    assert ask(configs) == SHIPPED


@needs_kernels
def test_explain_tells_the_status(checkpoint: Checkpoint) -> None:
    model = load_tiny(checkpoint("qwen3_moe"), torch.float32).to(DEVICE)
    text = str(expertune.explain(expertune.optimize(model, backend="triton")))
    assert f"kernels: {lookup.TUNED.status(model.device)}" in text.splitlines()


def test_nothing_is_read_at_import(tmp_path: Path) -> None:
    code = (
        "import sys\nopened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import expertune.backends.triton_steps, expertune.kernels.tuning.search\n"
        "from expertune.kernels.tuning.lookup import TUNED\n"
        "assert not TUNED.answers()\n"
        f"sys.exit([path for path in opened if path.startswith({str(tmp_path)!r})] or 0)\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
