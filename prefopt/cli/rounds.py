"""`prefopt rounds`: sample, judge, pair, train, again."""

from __future__ import annotations

import typer

from prefopt.cli.app import app
from prefopt.cli.runs import PASSED_ON

rounds = typer.Typer(help="Train on the model's own samples: sample, judge, pair, train, again.", no_args_is_help=True)
app.add_typer(rounds, name="rounds")


@rounds.callback()
def _group() -> None:
    # With a callback, one command alone is a group too.
    pass


@rounds.command(context_settings=PASSED_ON, options_metavar="[CONFIG.yaml] [OPTIONS; --help lists them]")
def run(context: typer.Context) -> None:
    """Run rounds: a config, or --prompts, --judges, --pairs, --loss ...; the same command continues a stopped run."""
    from prefopt.online.run import main

    words = list(context.args)
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    main(argv=words)
