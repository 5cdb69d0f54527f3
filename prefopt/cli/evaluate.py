"""`prefopt evaluate`: models side by side on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt.cli.app import app, console, fail, say

if TYPE_CHECKING:
    from prefopt.evaluation.intervals import Interval
    from prefopt.evaluation.report import ModelReport


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Hub names, models' or adapters' folders; win rates are against the first.")
    ],
    prompts: Annotated[str, typer.Option(help="A .jsonl file with prompts, or arithmetic: the bundled problems.")],
    judge: Annotated[str, typer.Option(help="A judge that scores: number, module:function, reward:MODEL ...")],
    limit: Annotated[int | None, typer.Option(min=2, help="Use so many prompts from the beginning.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a completion is cut.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples and intervals.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...; auto is that of the files.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="A .json file for all numbers.")] = None,
) -> None:
    """Draw samples of each model for the same prompts, score them, and show the numbers with 95% intervals."""
    import dataclasses
    import json

    from accelerate import PartialState

    from prefopt.evaluation.judges.base import ScoreJudge
    from prefopt.evaluation.judges.build import make_judge, parse_judge
    from prefopt.evaluation.report import evaluate as evaluated
    from prefopt.evaluation.report import report
    from prefopt.evaluation.tasks import arithmetic
    from prefopt.generation.samples import SamplingSettings
    from prefopt.generation.stage import read_prompts
    from prefopt.generation.transformers import TransformersGenerator
    from prefopt.models.load import load_model, load_tokenizer
    from prefopt.safety.files import write_text

    scorer = make_judge(parse_judge(judge))
    if not isinstance(scorer, ScoreJudge):
        fail(f"--judge {judge} compares answers; evaluate needs a judge that scores them")
    stops = tuple(stop or ())
    if prompts == "arithmetic":
        rows = arithmetic.problems("heldout", limit or 100)
        stops, max_new_tokens = stops or arithmetic.STOP, min(max_new_tokens, arithmetic.MAX_NEW_TOKENS)
    else:
        rows = read_prompts(Path(prompts))[0][:limit]
    if len(rows) < 2:
        fail(f"{prompts} has {len(rows)} prompts; intervals need two or more")
    settings = SamplingSettings(samples, temperature, max_new_tokens=max_new_tokens, stop=stops, seed=seed)
    results = []
    for name in models:
        network = load_model(name, {"dtype": dtype}).to(PartialState().device)
        generator = TransformersGenerator(network, load_tokenizer(name))
        del network
        results.append(evaluated(generator, rows, scorer, settings, name))
        generator.close()
    reports = report(results, rows, seed=seed)
    if PartialState().is_main_process:
        _show(reports)
        if out is not None:
            facts: dict[str, object] = {"prompts": prompts, "judge": judge, "sampling": dataclasses.asdict(settings)}
            facts["models"] = [dataclasses.asdict(one) for one in reports]
            write_text(out, json.dumps(facts, indent=2) + "\n")
            say(f"Written to {out}")


def _show(reports: list[ModelReport]) -> None:
    from prefopt.safety.tables import table

    shown = table("", *(one.model for one in reports))
    lines: list[tuple[str, list[str]]] = [
        ("mean score", [_interval(one.mean_score) for one in reports]),
        *(
            (f"pass@{k}", [_interval(one.pass_at_k.get(k)) for one in reports])
            for k in sorted({k for one in reports for k in one.pass_at_k})
        ),
        ("majority vote", [_interval(one.majority) for one in reports]),
        ("win rate", [_interval(one.win_rate) for one in reports]),
        ("win rate, length-controlled", [_interval(one.length_controlled) for one in reports]),
        ("tokens a sample", [f"{one.tokens:.1f}" for one in reports]),
        ("finished", [f"{one.finished:.0%}" for one in reports]),
        ("distinct-2", [f"{one.distinct_2:.3f}" for one in reports]),
        ("repetition", [f"{one.repetition:.3f}" for one in reports]),
        ("samples without a score", [str(one.unscored) for one in reports]),
    ]
    for name, cells in lines:
        if any(cells):
            shown.add_row(name, *cells)
    console().print(shown)


def _interval(one: Interval | None) -> str:
    return "" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
