"""`expertune tune` as a user calls it, in Triton's interpreter, and what the next process makes of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from expertune.cli import app

pytest.importorskip("triton")

Run = Callable[..., subprocess.CompletedProcess[str]]
SIZES = ("--experts=3", "--top-k=2", "--hidden=16", "--intermediate=16", "--rank=8")
TUNE = "from expertune.cli import main; main()"
# a launch of the walk's first product, and the configuration that it took
ASK = """
import torch
from expertune.backends.triton_steps import STEPS
from expertune.kernels.tuning.lookup import TUNED
routing = STEPS.dispatch(torch.tensor([[0, 1], [2, 1]]), 3)
low_rank = torch.ones(4, 8), torch.ones(3, 32, 8).mT
STEPS.linear(torch.ones(4, 16), torch.ones(3, 32, 16).mT, routing, low_rank=low_rank)
(config,) = TUNED.answers().values()
print(config)
print(TUNED.status(torch.device("cpu")))
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def start(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
        environment |= {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


def cache_of(folder: Path) -> Path:
    (path,) = (folder / "expertune" / "tune").glob("*.json")
    return path


def test_the_next_process_takes_what_was_tuned(run: Run, tmp_path: Path) -> None:
    assert "shipped configurations" in run(ASK).stdout
    result = run(TUNE, "tune", *SIZES, "--tokens=2,4", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    # four linears and four shrinks; both counts of tokens fall into the smallest bucket, so each is searched once
    assert sum("  ETA 0:00" in line for line in lines) == 8
    assert lines[7].startswith("24/24  linear 32→16 r8, ≤32 rows: ")
    path = cache_of(tmp_path)
    assert lines[-1] == f"written to {path}"
    text = path.read_text(encoding="utf-8")
    entry = text[text.index("width_in=16 width_out=32 rank=8 is_k_contiguous=1 rows=32") :]
    # the choice depends on the machine's speed; another one is laid in its place, so that it cannot come from the table
    start, end = entry.index("{"), entry.index("}") + 1
    changed = entry[:start] + '{"columns": 64, "depth": 16, "num_warps": 8, "num_stages": 2}' + entry[end:]
    path.write_text(text.replace(entry, changed), encoding="utf-8")
    answer = run(ASK)
    assert answer.stdout.splitlines() == ["64x16 8 warps 2 stages", f"tuned configurations: 8, from {path}"], (
        answer.stderr
    )

    path.write_text(text[:100], encoding="utf-8")
    answer = run(ASK)
    assert answer.stdout.splitlines()[0] == "32x16 4 warps 2 stages"
    assert f"{path} cannot be used" in answer.stdout
    assert answer.stderr == ""


def test_a_model_is_read_by_its_config_alone(run: Run, tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((make_base("gpt_oss") / "config.json").read_text())
    result = run(TUNE, "tune", str(folder), "--tokens=3", "--dtype=float32", "--rank=0")
    assert result.returncode == 0, result.stderr
    # gpt-oss has weights as (E, I, O): forward reads them with O dense, backward with I
    assert "linear 32→48 r0, ≤32 rows: " in result.stdout
    assert "linear 48→32 r0, K dense, ≤32 rows: " in result.stdout
    assert "shrink" not in result.stdout


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """In this process, where kernels are not interpreted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either MODEL or all of --experts"),
        (("some/model", *SIZES), "either MODEL or all of --experts"),
        ((*SIZES, "--dtype=int8"), "dtype must be one of bfloat16, float16, float32"),
        ((*SIZES, "--tokens=1024,"), "tokens must be whole numbers"),
        ((*SIZES, "--tokens=0"), "tokens must be whole numbers"),
    ],
)
def test_arguments_that_make_no_sense(
    invoke: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def assert_one_paragraph(code: int, error: str, words: str) -> None:
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((*SIZES, "--top-k=4"), "a token cannot take 4 of 3 experts"), (("./not-there",), "./not-there")],
)
def test_what_no_card_could_run(
    invoke: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(*arguments)
    assert_one_paragraph(result.exit_code, result.stderr, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(  # one reason of several, which are the backend's
            SIZES,
            "our Triton backend needs torch.float16, torch.float32, got torch.bfloat16",
            marks=pytest.mark.thorough,
            id="dtype",
        ),
        pytest.param((*SIZES, "--hidden=18", "--dtype=float32"), "multiples of 16 bytes", id="width"),
    ],
)
def test_what_the_kernels_do_not_run(run: Run, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(TUNE, "tune", *arguments)
    assert_one_paragraph(result.returncode, result.stderr, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(invoke: Callable[..., Result]) -> None:
    result = invoke(*SIZES)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the kernels cannot be tuned here: our Triton backend needs a CUDA or ROCm device, got cpu. "
        "Run this on the card that will train.\n"
    )


def test_a_cache_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "expertune").write_text("a file in the folder's place")
    result = run(TUNE, "tune", *SIZES, "--tokens=2", "--dtype=float32")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the cache cannot be written: ")
