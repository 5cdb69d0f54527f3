"""The `prefopt` command itself, and how its commands print and fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from prefopt import __version__
from prefopt.safety.errors import message_of

_ORDER = ("demo", "train", "check", "plan", "losses", "new", "unlearn", "pair")
"""Commands whose help comes first."""


class _Commands(TyperGroup):
    """Lists commands in the order of a newcomer's needs, and ends one with the message alone of an error for users."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `prefopt losses | head`: typer ends quietly
        except Exception as error:
            if (message := message_of(error)) is None:
                raise
            fail(message)


app = typer.Typer(
    cls=_Commands,
    help="Preference optimization for language models.",
    no_args_is_help=True,
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
    """Print a line without wrapping, so that a path or a column marker stays on one line."""
    console().print(Text(line), soft_wrap=True)


def console() -> Console:
    # Made when it is used, so that it knows the width of the terminal as it is then.
    return Console()


def refuse_overwriting(out: Path, *inputs: Path | str | None) -> None:
    """End the command, before its work, if the file to write is one that it reads, or cannot be written."""
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_dir():
        fail(f"--out {out} is a folder: name a file in it")
    if not existing.is_dir():
        fail(f"--out {out}: {existing} is a file, not a folder")
    if not os.access(out if out.exists() else existing, os.W_OK):
        fail(f"--out {out} cannot be written to: name another file, or make it writable")
    for one in inputs:
        if one is not None and Path(one).expanduser().resolve() == out.resolve():
            fail(f"--out {out} is the file that is read, and would be lost: name another one")


def fail(message: str) -> NoReturn:
    """End the command with an error, as the recipes end."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(1)
