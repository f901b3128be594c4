"""The command line. Nothing heavy is imported before a command runs, so that `--help` and `--version` stay quick."""

from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:  # which an installation of the library alone has not
    raise SystemExit("error: the command line needs more: pip install 'expertune[train]'") from error

import expertune
from expertune.cli.train import train
from expertune.cli.tune import tune

app = typer.Typer(
    name="expertune",
    help="Fine-tune Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(tune)


def main() -> None:
    """Run the command that the arguments name."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"expertune {expertune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""
