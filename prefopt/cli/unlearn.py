"""`prefopt unlearn`: make a model forget, and measure what it forgot."""

from __future__ import annotations

import typer

from prefopt.cli.app import app
from prefopt.cli.runs import PASSED_ON

unlearn = typer.Typer(help="Make a model forget a set, and measure what it forgot.", no_args_is_help=True)
app.add_typer(unlearn, name="unlearn")


@unlearn.callback()
def _group() -> None:
    # With a callback, one command alone is a group too.
    pass


@unlearn.command(context_settings=PASSED_ON, options_metavar="[OPTIONS; --help lists them]")
def run(context: typer.Context) -> None:
    """Learn, forget, measure: --demo, or --model_name_or_path, --forget_set, --retain_set, --loss ..."""
    from prefopt.recipe.unlearning import main

    main(argv=context.args)
