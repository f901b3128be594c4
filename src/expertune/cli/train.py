"""`expertune train`: a run from a recipe, or the demo."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def _show_keys(asked: bool) -> None:
    """The keys of a recipe, each with its default and what it says."""
    if not asked:
        return
    from expertune.training.recipe import Recipe

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, field in Recipe.model_fields.items():
        default = "needed" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        table.add_row(name, default, " ".join((field.description or "").split()))
    Console().print(table, markup=False, highlight=False)
    raise typer.Exit


def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE.yaml", help="The recipe. Without any argument, the demo runs.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Values that are laid over the recipe.")
    ] = None,
    _keys: Annotated[
        bool, typer.Option("--keys", help="List the keys of a recipe and stop.", callback=_show_keys, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says. Paths in the recipe are relative to the working directory."""
    values = list(overrides or [])
    if recipe is not None and "=" in recipe and not Path(recipe).is_file():
        values.insert(0, recipe)
        recipe = None
    if wrong := [value for value in values if "=" not in value]:
        raise typer.BadParameter(f"{wrong[0]!r} is neither the recipe, which comes first, nor key=value.")
    # here, not above: torch and the hosts take seconds to import
    from expertune.training.errors import UserError

    try:
        if recipe is None and not values:
            from expertune.training.demo import run_demo

            run_demo()
        else:
            _train(recipe, values)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _train(path: str | None, overrides: list[str]) -> None:
    from expertune.training.recipe_file import load_recipe

    recipe = load_recipe(path, overrides)

    from expertune.training.run import run

    run(recipe, source=path)
