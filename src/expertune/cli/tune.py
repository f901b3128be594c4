"""`expertune tune`: measure how the kernels are cut best on this card, for the experts of a model."""

from typing import Annotated

import typer
from rich.console import Console

_DTYPES = ("bfloat16", "float16", "float32")


def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or folder; only its config is read.")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of a layer, where no model is given.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the model.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Width of an expert.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="LoRA rank; of several active adapters their sum.")] = 16,
    tokens: Annotated[
        str, typer.Option(help="Tokens of a forward pass (batch size times length), with commas.")
    ] = "1024,4096,16384",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(_DTYPES)}.")] = "bfloat16",
) -> None:
    """Tune the kernels for a model on this card. Training then takes what was found from the cache."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    numbers = [text.strip() for text in tokens.split(",")]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise typer.BadParameter(f"tokens must be whole numbers with commas between them, got {tokens!r}.")
    sizes = [size for size in (experts, top_k, hidden, intermediate) if size is not None]
    if len(sizes) != (0 if model else 4):
        raise typer.BadParameter("give either MODEL or all of --experts, --top-k, --hidden and --intermediate.")
    # here, not above: torch and the hosts take seconds to import
    from expertune.cli.tune_run import request_for, run
    from expertune.training.errors import UserError

    try:
        request = request_for(model or sizes, rank=rank, tokens=[int(number) for number in numbers], dtype=dtype)
        run(request, Console())
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
