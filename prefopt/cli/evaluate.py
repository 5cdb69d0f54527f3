"""`prefopt evaluate`: models side by side on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt.cli.app import app, console, fail, refuse_overwriting, say
from prefopt.cli.generators import read_dtype

if TYPE_CHECKING:
    from prefopt.evaluation.benchmarks import TaskResult
    from prefopt.evaluation.intervals import Interval
    from prefopt.evaluation.report import ModelReport
    from prefopt.generation.samples import PromptRow


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Hub names, models' or adapters' folders; win rates are against the first.")
    ],
    prompts: Annotated[
        str | None, typer.Option(help="A .jsonl file with prompts, or arithmetic: the bundled problems.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A judge: number, module:function, reward:MODEL, preference:MODEL ...")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Use so many prompts from the beginning.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Where a completion is cut; 256, or what the bundled problems need.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.")] = None,
    answer_column: Annotated[
        str | None,
        typer.Option(help="The prompts' column with the right number, for majority vote; else the judge's column."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task of lm-eval (an extra), such as arc_easy; may be repeated.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="YAML files of your own tasks, in lm-eval's form; --tasks names them.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="So many examples of each task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples and intervals.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; auto is that of the files.", callback=read_dtype)
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="A .json file for all numbers.")] = None,
) -> None:
    """Draw samples of each model for the same prompts, judge them, and show the numbers with 95% intervals.

    With --tasks, also (or only) tasks of lm-eval.
    """
    import dataclasses

    from accelerate import PartialState

    from prefopt.evaluation.benchmarks import TaskResult, find_tasks, run_tasks
    from prefopt.evaluation.judges.build import make_judge, parse_judge
    from prefopt.evaluation.report import evaluate as evaluated
    from prefopt.evaluation.report import report
    from prefopt.generation.memory import free_memory
    from prefopt.generation.prompts import prompt_ids
    from prefopt.generation.samples import SamplingSettings
    from prefopt.generation.transformers import TransformersGenerator
    from prefopt.models.load import load_model, load_tokenizer

    if (prompts is None) != (judge is None) or not (prompts or tasks):
        fail("name --prompts and --judge, or --tasks of lm-eval, or all three")
    if out is not None:
        refuse_overwriting(out, prompts)
        if out.suffix.lower() != ".json":
            fail(f"--out {out} must end in .json: the numbers are one JSON object")
        out.parent.mkdir(parents=True, exist_ok=True)
    if (task_folder or task_limit) and not tasks:
        fail("--task-folder and --task-limit need --tasks")
    spec = None if judge is None else parse_judge(judge)
    if spec is not None and spec.weight != 1:
        fail("one judge has no weight: leave weight= out")
    referee = None if spec is None else make_judge(spec)
    column = answer_column or ("answer" if spec is None else str(spec.options.get("column", "answer")))
    benchmarks = find_tasks(tasks, task_folder) if tasks else None
    rows, length, stops = _prompts(prompts, limit, max_new_tokens, stop)
    settings = SamplingSettings(
        _drawn(samples, temperature) if rows else samples, temperature, max_new_tokens=length, stop=stops, seed=seed
    )
    if answer_column is not None and all(row.columns.get(answer_column) is None for row in rows):
        fail(f"--answer-column {answer_column}: no prompt has this column")
    tokenizers = {name: load_tokenizer(name) for name in models}
    for tokenizer in tokenizers.values():
        _ = [prompt_ids(row, tokenizer) for row in rows[:1]]  # what cannot be rendered ends the command at once
    results, numbers = [], dict[str, list[TaskResult]]()
    for name in models:
        network, tokenizer = load_model(name, {"dtype": dtype}).to(PartialState().device), tokenizers[name]
        if benchmarks:
            numbers[name] = run_tasks(network, tokenizer, benchmarks, limit=task_limit, seed=seed)
        if referee is not None:
            generator = TransformersGenerator(network, tokenizer)
            results.append(evaluated(generator, rows, referee, settings, name))
            generator.close()
        del network
        free_memory()
    reports = report(results, rows, seed=seed, judge=referee, column=column) if results else []
    if PartialState().is_main_process:
        if reports:
            _show(reports)
        if numbers:
            _show_tasks(numbers)
        if out is not None:
            facts = {"prompts": prompts, "judge": judge, "sampling": dataclasses.asdict(settings)}
            _write(out, facts, reports, numbers)


def _drawn(samples: int, temperature: float) -> int:
    """How many samples of a prompt are drawn: one where all would be the same."""
    from accelerate import PartialState

    if temperature > 0 or samples == 1:
        return samples
    if PartialState().is_main_process:
        say("Temperature 0 takes the likeliest token: one completion of each prompt is drawn")
    return 1


def _write(
    out: Path, drawn: Mapping[str, object], reports: list[ModelReport], numbers: dict[str, list[TaskResult]]
) -> None:
    """All numbers; those of answers behind what says how they were drawn."""
    import dataclasses
    import json

    from prefopt.safety.files import write_text

    facts: dict[str, object] = {}
    if reports:
        facts |= {**drawn, "models": [dataclasses.asdict(one) for one in reports]}
    if numbers:
        facts |= {"tasks": {name: [dataclasses.asdict(one) for one in of] for name, of in numbers.items()}}
    write_text(out, json.dumps(facts, indent=2) + "\n")
    say(f"Written to {out}")


def _prompts(
    prompts: str | None, limit: int | None, max_new_tokens: int | None, stop: list[str] | None
) -> tuple[list[PromptRow], int, tuple[str, ...]]:
    """The rows, and where a completion of them is cut and ends."""
    from prefopt.evaluation.tasks import arithmetic
    from prefopt.generation.stage import read_prompts

    stops = tuple(stop or ())
    if prompts is None:
        return [], max_new_tokens or 256, stops
    if prompts == "arithmetic":
        rows = arithmetic.problems("heldout", limit or 100)
        return rows, max_new_tokens or arithmetic.MAX_NEW_TOKENS, stops or arithmetic.STOP
    rows = read_prompts(Path(prompts))[0][:limit]
    if len(rows) < 2:
        fail(f"{prompts} has {len(rows)} prompts; intervals need two or more")
    return rows, max_new_tokens or 256, stops


def _show_tasks(numbers: dict[str, list[TaskResult]]) -> None:
    from prefopt.safety.tables import table

    shown = table("lm-eval task", "metric", *numbers, right=tuple(numbers))
    keys = dict.fromkeys((one.task, one.metric) for of_model in numbers.values() for one in of_model)
    for key in keys:
        cells = ({(one.task, one.metric): one for one in of_model}.get(key) for of_model in numbers.values())
        shown.add_row(*key, *("" if one is None else _with_error(one) for one in cells))
    console().print(shown)


def _with_error(one: TaskResult) -> str:
    return f"{one.value:.3f}" + ("" if one.standard_error is None else f" \u00b1 {one.standard_error:.3f}")


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
    for one in reports:
        for reason, count in one.missing.items():
            say(f"{one.model}: {count} samples without a score: {reason}")


def _interval(one: Interval | None) -> str:
    return "" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
