"""Run the experiments of papers and decide their claims. Outcomes are kept, so that a stopped run can be continued.

An experiment is run again when its code, rows, model or environment have changed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.paper import Claim, Paper, PaperError, read_papers
from prefopt.reproduction.stored import EXPERIMENTS, Stored, inputs_of, load, run_experiment, save
from prefopt.reproduction.verdict import Verdict, spread, verdict_of
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.files import write_text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What came of one claim.

    Attributes:
        paper: its file's name.
        claim: as the file has it.
        verdict: computed from the numbers; `not run` for what `--quick` left out or was not reached.
        measured: the numbers that decide, in words; the reason or the error where there are none.
        interval: mean and 95% interval over seeds, or "".
        settings: what the paper leaves open and was chosen here.
        numbers: by name, one value a seed.
        picture: lines to draw, or None.
        seconds: of processor time of its experiment, which may serve several claims.
    """

    paper: str
    claim: Claim
    verdict: Verdict
    measured: str
    interval: str = ""
    settings: str = ""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    picture: Picture | None = None
    seconds: float = 0.0


def reproduce(
    papers: Sequence[Paper],
    out: Path,
    quick: bool = False,
    threads: int = 1,
    say: Say = lambda line: None,
    package: str = EXPERIMENTS,
) -> list[Result]:
    """Run what the claims of these papers need and is not kept in `out` yet.

    Args:
        papers: from `read_papers` or `select`.
        out: folder of results; `experiments/` in it has one file an experiment.
        quick: leave out the experiments that are marked `full`.
        threads: of torch; the numbers may depend on it.
        say: takes a line about each experiment.
        package: where the experiments' modules are.

    Returns:
        One result for each claim, in the papers' order.

    Raises:
        PaperError: if an experiment measures a claim that no paper has.
        UsageError: if nothing can be written into `out`.
    """
    import torch

    with retold(UsageError, f"{out} cannot be the folder of results"):
        (out / "experiments").mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stored = _run_all(papers, out / "experiments", quick, say, package)
    except KeyboardInterrupt:
        say("Stopped. Finished experiments are stored, and the same command continues.")
        raise
    finally:
        torch.set_num_threads(before)
    results = results_of(papers, stored)
    _write_results(results, out)
    return results


def _run_all(papers: Sequence[Paper], folder: Path, quick: bool, say: Say, package: str) -> dict[str, Stored]:
    names = list(dict.fromkeys(name for paper in papers for name in paper.experiments(quick)))
    stored: dict[str, Stored] = {}
    for number, name in enumerate(names, 1):
        inputs, kept = inputs_of(name, package), load(name, folder)
        if kept is not None and not kept.error and kept.inputs.key == inputs.key:
            say(f"{number}/{len(names)}  {name}: kept from before")
            stored[name] = kept
            continue
        say(f"{number}/{len(names)}  {name} ...")
        stored[name] = save(run_experiment(name, inputs, package), folder)
        say(f"{number}/{len(names)}  {name}: {stored[name].error or f'{stored[name].seconds:.0f} s'}")
    return stored


def kept_results(paper: Paper, out: Path) -> list[Result]:
    """What `out` holds of a paper, whether or not its inputs are still the same."""
    stored = {name: one for name in paper.experiments(quick=False) if (one := load(name, out / "experiments"))}
    return results_of([paper], stored)


def results_of(papers: Sequence[Paper], stored: dict[str, Stored]) -> list[Result]:
    """The verdicts that the outcomes of experiments give."""
    # An experiment may serve papers that were not asked for.
    known = {(claim.experiment, claim.id) for paper in (*papers, *read_papers()) for claim in paper.claims}
    for name, one in stored.items():
        for outcome in one.outcomes:
            if (name, outcome.claim) not in known:
                raise PaperError(f"experiment {name} measures {outcome.claim!r}, which no paper's file has as a claim")
    return [_result(paper, claim, stored) for paper in papers for claim in paper.claims]


def _result(paper: Paper, claim: Claim, stored: dict[str, Stored]) -> Result:
    if claim.cannot:
        return Result(paper.name, claim, "cannot be run here", claim.cannot)
    one = stored.get(claim.experiment)
    if one is None:
        reason = "not run yet" if claim.run == "quick" else "left out by --quick"
        return Result(paper.name, claim, "not run", reason)
    if one.error:
        return Result(paper.name, claim, "error", one.error, seconds=one.seconds)
    outcome = next((each for each in one.outcomes if each.claim == claim.id), None)
    if outcome is None:
        return Result(paper.name, claim, "error", f"{claim.experiment} did not measure it", seconds=one.seconds)
    return _decided(paper, claim, outcome, one.seconds)


def _decided(paper: Paper, claim: Claim, outcome: Outcome, seconds: float) -> Result:
    try:
        verdict = verdict_of(claim, outcome)
    except PaperError as error:
        return Result(paper.name, claim, "error", str(error), seconds=seconds)
    numbers = {name: list(values) for name, values in outcome.numbers.items()}
    return Result(
        *(paper.name, claim, verdict, outcome.measured, spread(numbers), outcome.settings),
        numbers=numbers,
        picture=outcome.picture,
        seconds=seconds,
    )


def _write_results(results: Sequence[Result], out: Path) -> None:
    rows: list[dict[str, Any]] = [dataclasses.asdict(result) for result in results]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(rows, indent=1) + "\n")
