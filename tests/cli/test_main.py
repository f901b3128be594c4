import subprocess
import sys

from typer.testing import CliRunner

import expertune
from expertune.cli import app


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"expertune {expertune.__version__}\n"
    assert "train" in CliRunner().invoke(app, ["--help"]).output
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    assert "RECIPE.yaml" in result.output


def test_starts_without_torch() -> None:
    code = (
        "import sys, contextlib\nfrom expertune.cli import main\nsys.argv = ['expertune', 'train', '--help']\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
