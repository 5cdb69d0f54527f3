"""`prefopt report` and `prefopt compare`: pages about saved runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefopt.cli.app import app, say

_BETA = "Beta of a run of TRL, whose log has rewards but no log-ratios."


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs, or checkpoints, of prefopt or TRL.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write, or a folder for it; default: the run's own.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help=_BETA)] = None,
) -> None:
    """Write the page of a run: its curves, findings, answers, data and settings in one HTML file."""
    from prefopt.report import write_run_page
    from prefopt.safety.errors import UsageError

    _check_beta(beta)
    if out is not None and len(runs) > 1:
        raise UsageError(f"--out names one file, and there are {len(runs)} runs: leave it out")
    for run in runs:
        say(f"Wrote {write_run_page(run, out, beta, _findings(run, beta))}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs, or checkpoints, of prefopt or TRL.")],
    out: Annotated[Path, typer.Option(help="The folder to write compare.html, .md and .json into.")] = Path(
        "compared"
    ),
    beta: Annotated[float | None, typer.Option(help=_BETA)] = None,
) -> None:
    """Compare runs by what means the same for every loss, and say which is better, or that none is."""
    import json

    from prefopt.report import compare_runs

    _check_beta(beta)
    page = compare_runs(runs, out, beta)
    compared = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    for line in (compared["verdict"], *compared["cautions"], f"Wrote {page}"):
        say(line)


def _check_beta(beta: float | None) -> None:
    from prefopt.safety.errors import UsageError

    if beta is not None and not beta > 0:
        raise UsageError(f"--beta must be above 0, got {beta}")


def _findings(run: Path, beta: float | None) -> list[dict[str, Any]] | None:
    """What `prefopt health` says now, for a folder that stores no findings; None for files that it cannot read."""
    from prefopt.analysis.health.saved import examine_saved
    from prefopt.safety.errors import UsageError

    try:
        return [finding.as_object() for finding in examine_saved(run, beta)]
    except UsageError:  # the page names them
        return None
