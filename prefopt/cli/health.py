"""`prefopt health`: what the log of saved runs says about them, and what their models say of pairs."""

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
    pairs: Annotated[
        str | None, typer.Option(help="Pairs, best held-out ones, to load the model and rank: a file or a Hub name.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of --pairs.")] = "train",
    loss: Annotated[str | None, typer.Option(help="The loss of --pairs, if the run's log does not say it.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before training, for --pairs and --spectra of whole models.")
    ] = None,
    entanglement: Annotated[
        bool, typer.Option("--entanglement", help="Also measure gradient entanglement on 16 of the pairs.")
    ] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Also fit power laws to the weights' spectra, before and after training.")
    ] = False,
) -> None:
    """Say what the logged numbers of a run show: over-optimised, learns nothing, diverges ..."""
    from prefopt.analysis.health.finding import LEVELS
    from prefopt.analysis.health.saved import lines_and_findings
    from prefopt.analysis.health.watch import too_few
    from prefopt.safety.errors import UsageError

    if beta is not None and not beta > 0:
        raise UsageError(f"--beta must be above 0, got {beta}")
    if pairs is None and (entanglement or loss is not None):
        raise UsageError("--entanglement and --loss are about pairs: name some with --pairs")
    if reference is not None and pairs is None and not spectra:
        raise UsageError("--reference is for --pairs and --spectra: name one of them")
    serious = False
    for run in runs:
        lines, findings = lines_and_findings(run, beta)
        serious = serious or any(finding.level == LEVELS[0] for finding in findings)
        few = too_few(lines)
        say(f"{run}: {len(findings)} finding{'' if len(findings) == 1 else 's'}{few and f'; {few}'}")
        for finding in findings:
            say(f"  {finding}")
        if pairs is not None:
            _look_at_pairs(run, pairs, split, loss, reference, entanglement)
        if spectra:
            _look_at_weights(run, reference)
    if strict and serious:
        raise typer.Exit(1)


def _look_at_pairs(
    run: Path, data: str, split: str, loss: str | None, reference: str | None, entanglement: bool
) -> None:
    """What the model of a run says of pairs."""
    from prefopt.analysis.gradients.probes import PROBES
    from prefopt.analysis.pairs.rules import LEAST_PAIRS, examine_pairs
    from prefopt.analysis.pairs.saved import load_pairs

    loaded = load_pairs(run, data, loss=loss, reference=reference, split=split)
    table = loaded.table()
    say(
        f"{run}, {len(table)} pairs of {data}: accuracy {table.accuracy:.2f}, Brier score {table.brier:.3f}, expected "
        f"calibration error {table.calibration_error:.3f}, margin explained by length {table.explained_by_length:.0%}"
    )
    if len(table) < LEAST_PAIRS:
        say(f"  fewer than {LEAST_PAIRS} pairs, too few for findings")
    for finding in examine_pairs(table):
        say(f"  {finding}")
    if entanglement:
        say(f"  {loaded.entanglement(PROBES)}")


def _look_at_weights(run: Path, reference: str | None) -> None:
    """The spectra of a run's weights."""
    from prefopt.analysis.spectra.layers import describe, layer_spectra
    from prefopt.models.load import load_model

    before = None if reference is None else load_model(reference, {})
    for line in describe(layer_spectra(load_model(str(run), {}), before)):
        say(f"  {line}")
