"""`prefopt sweep`: many losses, hyperparameters or seeds on one data set, and which is best."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prefopt.cli.app import app, console, fail
from prefopt.safety.shipped import shipped_names


@app.command()
def sweep(
    config: Annotated[
        str,
        typer.Argument(
            help="A YAML file: options of `prefopt train`, and a section sweep (docs/sweep.md); or sweeps/losses.",
            metavar="CONFIG",
            autocompletion=lambda: [name for name in shipped_names("configs") if name.startswith("sweeps/")],
        ),
    ],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of all trials, as in --set max_steps=4; may be repeated."),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="The folder of the sweep; output_dir of the config, or runs/sweep.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the trials; train nothing.")] = False,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Train many settings on the same rows and compare them; the same command continues a stopped sweep."""
    from prefopt.recipe.sweep import SweepCall, run_sweep
    from prefopt.recipe.sweep.loop import run_worker

    call = SweepCall(config, dict(map(_changed, change or ())), output_dir)
    if worker:
        run_worker(call, console())
    else:
        run_sweep(call, console(), dry_run)


def _changed(words: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = words.partition("=")
    if not separator or not name:
        fail(f"--set {words}: write NAME=VALUE")
    try:
        return name.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError:
        fail(f"--set {words}: the value is not valid YAML")
