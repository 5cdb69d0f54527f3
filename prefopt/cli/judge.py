"""`prefopt judge`: judgements of samples, and what they say about the judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt.cli.app import app, console, fail, refuse_overwriting, say

if TYPE_CHECKING:
    from prefopt.evaluation.agreement import JudgeSummary


@app.command()
def judge(
    samples: Annotated[Path, typer.Argument(help="The file of samples: prompt and completion in each line.")],
    judge: Annotated[
        list[str],
        typer.Option(help="number, exact, regex:PATTERN, math, module:function, ...; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; one that was begun is continued.")],
    prompts: Annotated[
        Path | None, typer.Option(help="The file of prompts, whose columns hold the right answers.")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Pairs a prompt that are compared, drawn at random; all if left out.")
    ] = None,
    tournament: Annotated[
        bool, typer.Option("--tournament", help="Compare only what `prefopt pair --builder tournament` needs.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For the choice of pairs.")] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor store earlier answers.")] = False,
) -> None:
    """Score samples, or compare those of one prompt, with one or more judges."""
    from prefopt.evaluation.agreement import agreements, summarize
    from prefopt.evaluation.cache import JudgementCache, cache_file
    from prefopt.evaluation.judgements import read_judgements
    from prefopt.evaluation.judges.base import PairJudge
    from prefopt.evaluation.judges.build import make_judge, parse_judge
    from prefopt.evaluation.stage import Pairing, judge_to_file
    from prefopt.generation.samples import read_samples
    from prefopt.generation.stage import read_prompts
    from prefopt.online.builders import parse_builder
    from prefopt.online.comparisons import comparisons_of
    from prefopt.online.pairing import PairSettings

    refuse_overwriting(out, samples, prompts)
    specs = [parse_judge(text) for text in judge]
    if any(spec.weight != 1 for spec in specs):
        fail("weights count when pairs are made: name them there, as in prefopt pair --weight number=2")
    judges = [make_judge(spec) for spec in specs]
    if (tournament or pairs is not None) and not any(isinstance(one, PairJudge) for one in judges):
        fail(
            f"{'--tournament' if tournament else '--pairs'} says which samples are compared, and no --judge compares "
            "two: leave it out"
        )
    judged = list(read_samples(samples))
    if not judged:
        fail(f"{samples} has no samples")
    rows = {} if prompts is None else {row.id: row for row in read_prompts(prompts)[0]}
    if tournament and pairs is not None:
        fail("--pairs draws pairs at random, and --tournament names them: leave one out")
    pairing = comparisons_of(PairSettings(parse_builder("tournament"))) if tournament else Pairing(pairs, seed)
    cache = None if no_cache else JudgementCache(cache_file())
    judge_to_file(judged, judges, out, rows=rows, cache=cache, pairing=pairing)
    judgements = list(read_judgements(out))
    names = len({sample.prompt_id for sample in judged})
    say(f"{out}: {len(judgements)} judgements of {len(judged)} samples of {names} prompts")
    summaries = summarize(judgements, judged)
    _show(summaries)
    for one in agreements(judgements):
        kappa = "" if one.kappa is None else f", Cohen's kappa {one.kappa:.2f}"
        tau = "" if one.tau is None else f", Kendall's tau {one.tau:.2f}"
        say(f"{' and '.join(one.judges)} order {one.same:.0%} of {one.pairs} pairs alike{kappa}{tau}")
    if not any(summary.judged for summary in summaries):
        fail("nothing was judged: the reasons are above and in the file")


def _show(summaries: list[JudgeSummary]) -> None:
    from prefopt.safety.tables import table

    columns = ("judged", "mean", "ties", "first wins", "both orders", "length")
    shown = table("judge", *columns, right=columns)
    for one in summaries:
        ties = one.ties if one.kind == "preference" else one.tied_pairs
        mean = "" if one.mean_score is None else f"{one.mean_score:.3f}"
        length = "" if one.length_tau is None else f"{one.length_tau:+.2f}"
        shown.add_row(one.judge, str(one.judged), mean, *map(_percent, (ties, one.first_wins, one.consistent)), length)
    console().print(shown)
    for one in summaries:
        for reason, count in one.missing.items():
            say(f"{one.judge}: {count} without a judgement: {reason}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
