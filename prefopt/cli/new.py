"""`prefopt new`: write a recipe or a config that comes with the package to a file, to be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefopt.cli.app import app, fail, say
from prefopt.safety.files import write_whole
from prefopt.safety.shipped import find_shipped, near_names, shipped_names

new = typer.Typer(help="Write a recipe or a config that comes with prefopt, to change it.", no_args_is_help=True)
app.add_typer(new, name="new")

Out = Annotated[Path | None, typer.Option(help="The file to write; by default its name, in this folder.")]


@new.command()
def recipe(
    name: Annotated[
        str, typer.Argument(help="Of the recipe.", autocompletion=lambda: shipped_names("recipes", ".py"))
    ] = "dpo",
    out: Out = None,
) -> None:
    """Write the script of a recipe: every step of `prefopt train`, in the open."""
    file = _write(name, "recipes", ".py", out)
    say(f"Wrote {file}. Run it: accelerate launch {file}")


@new.command()
def config(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of the config; without one, lists them.", autocompletion=lambda: shipped_names("configs")
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Write a config: options for `prefopt train --config`, or (accelerate/...) for `accelerate launch`."""
    if name is None:
        if out is not None:
            fail("--out is for one config: name it")
        print("\n".join(shipped_names("configs")))
        return
    say(f"Wrote {_write(name, 'configs', '.yaml', out)}")


def _write(name: str, folder: str, ending: str, out: Path | None) -> Path:
    """Copy a file that comes with the package; an existing file is overwritten only if the user agrees."""
    source = find_shipped(name, folder, ending)
    if source is None:
        fail(f"no file in {folder} is called {name}.{near_names(name, folder, ending)}")
    target = Path(source.name) if out is None else out
    if target.is_dir():
        fail(f"{target} is a folder: name a file in it with --out")
    if target.exists():
        typer.confirm(f"{target} exists. Overwrite it?", abort=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda unfinished: unfinished.write_bytes(source.read_bytes()))
    return target
