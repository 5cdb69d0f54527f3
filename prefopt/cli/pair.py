"""`prefopt pair`: pairs from samples and their judgements, or from rows that compare or rank answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli.app import app, fail, refuse_overwriting, say

if TYPE_CHECKING:
    from prefopt.evaluation.judgements import Judgement

_SAMPLES, _ROWS = "Samples and judgements", "Rows that compare or rank answers"

Builder = Annotated[
    str | None,
    typer.Option(help="Makes the pairs: best_worst, round_robin(pairs=10), ...; or groups.", rich_help_panel=_SAMPLES),
]


@app.command()
def pair(
    data: Annotated[str, typer.Argument(help="Samples; or rows: a file, a save_to_disk folder or a Hub name.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    judgements: Annotated[Path | None, typer.Argument(help="Judgements of the samples.")] = None,
    builder: Builder = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="The file of prompts: for --gold, or with tools for the template.", rich_help_panel=_SAMPLES
        ),
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="Column of the gold answer in --prompts; it joins.", rich_help_panel=_SAMPLES)
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="A judge and its weight, as in exact=2; may be repeated.", rich_help_panel=_SAMPLES),
    ] = None,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Use samples that were cut, too.", rich_help_panel=_SAMPLES)
    ] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Use each of several equal texts.", rich_help_panel=_SAMPLES)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.", rich_help_panel=_SAMPLES)] = 0,
    prompt: Annotated[
        str | None, typer.Option(help="Column of the prompt, unless the answers hold it.", rich_help_panel=_ROWS)
    ] = None,
    first: Annotated[
        str | None, typer.Option(help="Column of the first of two answers.", rich_help_panel=_ROWS)
    ] = None,
    second: Annotated[str | None, typer.Option(help="Column of the second.", rich_help_panel=_ROWS)] = None,
    winner: Annotated[
        str | None,
        typer.Option(help="Column that says which is better (of a list: its place).", rich_help_panel=_ROWS),
    ] = None,
    first_wins: Annotated[
        str, typer.Option(help="Its values that mean the first, with commas.", rich_help_panel=_ROWS)
    ] = "",
    second_wins: Annotated[
        str, typer.Option(help="Its values that mean the second; all others are ties.", rich_help_panel=_ROWS)
    ] = "",
    answers: Annotated[
        str | None, typer.Option(help="Column of answers: a list, or one a row.", rich_help_panel=_ROWS)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Field of an answer with its text, if it is an object.", rich_help_panel=_ROWS)
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Field or column of ranks (or A,B): lowest is best.", rich_help_panel=_ROWS)
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Field or column of scores (or A,B): highest is best.", rich_help_panel=_ROWS)
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="All pairs of a row, not only best and worst.", rich_help_panel=_ROWS)
    ] = False,
    lists: Annotated[
        bool, typer.Option("--lists", help="No pairs: all answers of a prompt with their scores, as one group.")
    ] = False,
    split: Annotated[str, typer.Option(help="The split to pair.", rich_help_panel=_ROWS)] = "train",
    config: Annotated[
        str | None, typer.Option(help="The configuration of a set that has several.", rich_help_panel=_ROWS)
    ] = None,
) -> None:
    """Write pairs (prompt, chosen, rejected) of samples and judgements, or of rows that compare or rank answers.

    With --lists, rows that keep all answers of a prompt and their scores. Such rows become pairs with --builder, too.
    """
    refuse_overwriting(out, data, judgements, prompts)
    if builder is not None and lists:
        fail("--builder makes pairs, and --lists groups: name one of the two")
    keep = (keep_unfinished, keep_duplicates)
    if lists and judgements is not None:
        return _pair_samples(Path(data), judgements, out, "groups", prompts, gold, weight, keep, seed)
    of_samples = any((prompts, gold, weight, *keep))
    of_rows = any((prompt, first, second, winner, first_wins, second_wins, answers, text, rank, score, every))
    if builder is None:
        if judgements is not None or of_samples:
            fail("pairs of samples need a --builder: best_worst, correct_incorrect, round_robin(pairs=10), ...")
        better, worse = (
            tuple(word.strip() for word in words.split(",") if word) for words in (first_wins, second_wins)
        )
        how = (prompt, first, second, winner, better, worse, answers, text, rank, score, every, lists)
        return _pair_rows(data, out, split, config, how)
    if of_rows:
        fail("--builder pairs samples or groups: leave out the options for rows that compare or rank answers")
    if judgements is None and _are_groups(data):
        if of_samples:
            fail(
                f"{data} has groups, and --prompts, --gold, --weight, --keep-unfinished and --keep-duplicates are for "
                "samples: leave them out"
            )
        return _pair_groups(data, out, builder, split, config, seed)
    if config is not None or split != "train":
        fail("--config and --split name a part of a data set, and samples are one file: leave them out")
    return _pair_samples(Path(data), judgements, out, builder, prompts, gold, weight, keep, seed)


def _pair_rows(data: str, out: Path, split: str, config: str | None, how: Sequence[Any]) -> None:
    from prefopt.data import load_preferences
    from prefopt.data.rankings import Pairing, write_pairs

    pairing = Pairing(*how)
    counts = write_pairs(load_preferences(data, split=split, config=config), pairing, out)
    what = "groups" if pairing.lists else "pairs"
    say(
        f"{out}: {counts['pairs']} {what} from {counts['rows']} rows; {counts['rows without a pair']} rows made none "
        f"(a tie, or an answer is missing). Look at them: prefopt check {out}"
    )


def _pair_samples(
    samples: Path,
    judgements: Path | None,
    out: Path,
    builder: str,
    prompts: Path | None,
    gold: str | None,
    weight: list[str] | None,
    keep: tuple[bool, bool],
    seed: int,
) -> None:
    from prefopt.evaluation.judgements import read_judgements
    from prefopt.generation.samples import read_samples
    from prefopt.generation.stage import read_prompts
    from prefopt.online.builders import parse_builder
    from prefopt.online.pairing import PairSettings, check_gold, write_pairs

    judged = [] if judgements is None else list(read_judgements(judgements))
    how = PairSettings(
        parse_builder(builder),
        _weights(weight, judged),
        gold,
        "keep" if keep[0] else "drop",
        "keep" if keep[1] else "merge",
        seed,
    )
    if judgements is None and how.builder.needs_scores:
        fail(f"{how.builder} needs scores: name the file of judgements after the file of samples")
    if gold is not None and prompts is None:
        fail("--gold names a column of --prompts: name that file, too")
    prompt_rows = [] if prompts is None else read_prompts(prompts)[0]
    check_gold(how, prompt_rows, "--gold")
    counts = write_pairs(out, list(read_samples(samples)), judged, how, prompt_rows)
    rows = how.builder.rows
    empty = f"no prompt makes a {rows.removesuffix('s')}"
    _tell(out, counts, rows, empty, " --loss sft" if how.builder.supervised else "")


def _are_groups(data: str) -> bool:
    """Whether rows hold several completions each; samples hold one."""
    from prefopt.safety.jsonl import read_jsonl

    path = Path(data).expanduser()
    return not path.is_file() or path.suffix != ".jsonl" or "completions" in next(iter(read_jsonl(path)), {})


def _pair_groups(data: str, out: Path, builder: str, split: str, config: str | None, seed: int) -> None:
    from prefopt.data import clean, kind, read_preferences, validate
    from prefopt.online.builders import parse_builder
    from prefopt.online.groups import pairs_of_groups
    from prefopt.online.pairing import PairCounts
    from prefopt.safety.jsonl import write_jsonl

    rows = read_preferences(data, split=split, config=config, say=say)
    if kind(rows) != "group":
        fail(f"--builder makes pairs of samples or of rows with prompt, completions and scores; {data} has neither")
    counts = PairCounts()
    write_jsonl(out, pairs_of_groups(clean(rows, validate(rows)), parse_builder(builder), counts, seed))
    _tell(out, counts)


def _tell(
    out: Path,
    counts: Any,
    rows: str = "pairs",
    empty: str = "no prompt has two completions with different scores",
    check: str = "",
) -> None:
    """Print counts of what was written and left out; fail, saying why, if nothing was written."""
    for line in counts.lines(rows):
        say(line)
    if not counts.pairs:
        fail(f"{out} is empty: {empty}")
    say(f"Written to {out}. Look at them: prefopt check {out}{check}")


def _weights(words: list[str] | None, judgements: Sequence[Judgement]) -> dict[str, float] | None:
    """The weight of each judge; the command ends for a judge that has none, or that judged nothing."""
    if not words:
        return None
    try:
        weights = {name: float(value) for name, value in (word.rsplit("=", 1) for word in words)}
    except ValueError:
        fail(f"--weight is a judge and a number, as in exact=2; got {' '.join(words)}")
    judges = {one.judge for one in judgements}
    if weights.keys() != judges:
        fail(
            f"--weight must name each judge of the file once, 0 for one that shall not count; the file has "
            f"{', '.join(sorted(judges)) or 'no judgements'}, and the weights are of {', '.join(sorted(weights))}"
        )
    return {name: weight for name, weight in weights.items() if weight}
