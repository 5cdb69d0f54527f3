"""The `prefopt` command itself, and how its commands print and fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from prefopt import __version__

if TYPE_CHECKING:
    pass


app = typer.Typer(
    help="Preference optimization for language models.",
    no_args_is_help=True,
    add_completion=False,
    # `--max_length` is `--max-length`, as in the recipes.
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prefopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    # Without a docstring: the help is the app's.
    pass


def say(line: str) -> None:
    console().print(Text(line), soft_wrap=True)


def console() -> Console:
    # Made when it is used, so that it knows the width of the terminal as it is then.
    return Console()


def fail(message: str) -> None:
    # Not wrapped: a path or a column marker broken over two lines is of no use.
    console().print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(1)
