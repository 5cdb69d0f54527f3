"""`prefopt health`: what the log of saved runs says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefopt.cli.app import app, say


@app.command()
def health(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs, or checkpoints, of prefopt or TRL.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 if a finding is serious.")] = False,
    beta: Annotated[
        float | None, typer.Option(help="Beta of a run of TRL, whose log has rewards but no log-ratios.")
    ] = None,
) -> None:
    """Say what the logged numbers of a run show: over-optimised, learns nothing, diverges ..."""
    from prefopt.analysis.health.finding import LEVELS
    from prefopt.analysis.health.saved import lines_and_findings
    from prefopt.analysis.health.watch import too_few
    from prefopt.safety.errors import UsageError

    if beta is not None and not beta > 0:
        raise UsageError(f"--beta must be above 0, got {beta}")
    serious = False
    for run in runs:
        lines, findings = lines_and_findings(run, beta)
        serious = serious or any(finding.level == LEVELS[0] for finding in findings)
        few = too_few(lines)
        say(f"{run}: {len(findings)} finding{'' if len(findings) == 1 else 's'}{few and f'; {few}'}")
        for finding in findings:
            say(f"  {finding}")
    if strict and serious:
        raise typer.Exit(1)
