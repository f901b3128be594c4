import subprocess
import sys

import pytest
from typer.testing import CliRunner

import expertune
from expertune.cli import app


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"expertune {expertune.__version__}\n"
    assert "train" in CliRunner().invoke(app, ["--help"]).output
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert "RECIPE.yaml" in result.output


@pytest.mark.parametrize("command", ["train", "tune"])
def test_starts_without_torch(command: str) -> None:
    code = (
        "import sys, contextlib\nfrom expertune.cli import main\nsys.argv = ['expertune', *sys.argv[1:], '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
