"""Commands around runs: `prefopt train`, `demo`, `plan`, `merge`, `cache`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from prefopt.cli.app import app, console, fail, say


@app.command()
def cache(
    prune: Annotated[
        list[str] | None, typer.Option(help="Delete the reference of this name; may be repeated.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Delete references not written to for this many days.")
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Where references are kept, if not in the usual place.")] = None,
) -> None:
    """List the references whose log-probabilities are kept on disk, or delete some."""
    from datetime import datetime
    from pathlib import Path

    from prefopt.safety.tables import table
    from prefopt.scoring.cache import cache_root, entries
    from prefopt.scoring.cache import prune as delete

    root = cache_root() if folder is None else Path(folder)
    if prune or older_than is not None:
        unknown = set(prune or ()) - {entry.name for entry in entries(root)}
        if unknown:
            fail(f"there is no reference named {', '.join(sorted(unknown))} in {root}")
        for entry in delete(prune or (), older_than, root):
            say(f"deleted {entry.name}: {entry.rows} completions, {entry.size / 1e6:.1f} MB")
    references = entries(root)
    if not references:
        say(f"No references are kept in {root}")
        return
    listed = table("name", "model", "precision", "completions", "MB", "last written", right=("completions", "MB"))
    for entry in references:
        written = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        about = (Text(str(entry.about.get(key, ""))) for key in ("model", "precision"))
        listed.add_row(entry.name, *about, str(entry.rows), f"{entry.size / 1e6:.1f}", written)
    console().print(listed)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of a saved adapter.")],
    output: Annotated[
        str | None, typer.Option(help="Where to save the merged model; the adapter's name and -merged.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model to fold into, if not the one the adapter names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the merged weights: float32, bfloat16, float16.")] = None,
) -> None:
    """Fold an adapter into its base model, and compare the two."""
    from prefopt.models.merge import merge as fold

    merged = fold(adapter, output, base, dtype)
    precision = str(merged.dtype).removeprefix("torch.")
    say(
        f"Merged into {merged.base} ({precision}). On {merged.tokens} tokens the merged model differs from the "
        f"adapter by {merged.largest:.2g} nats at most, {merged.mean:.2g} on average; the adapter moves the base by "
        f"up to {merged.moved:.2g}."
    )
    if merged.moved == 0:
        say("The adapter changes nothing: is it the one you meant?")
    say(f"Saved to {merged.folder}")


# What follows the command's name is for another parser, `--help` included.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON, options_metavar="[OPTIONS; --help lists them]")
def train(context: typer.Context) -> None:
    """Train a model on preferences: --config FILE, --model_name_or_path, --dataset_name, --loss ..."""
    from prefopt.recipe import main as run_recipe

    run_recipe("dpo(beta=0.1)", context.args)


@app.command(context_settings=PASSED_ON, options_metavar="[OPTIONS; --help lists them]")
def demo(context: typer.Context) -> None:
    """Train the bundled model on the bundled pairs: `prefopt train`, which does so where nothing else is named."""
    train(context)


@app.command(context_settings=PASSED_ON, options_metavar="--model NAME [OPTIONS; --help lists them]")
def plan(context: typer.Context) -> None:
    """Estimate the memory of every way to train a model, and say which to take on given GPUs."""
    from prefopt.planning.plan import main as show_plan

    show_plan(context.args)
