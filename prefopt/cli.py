"""The `prefopt` command: look objectives up, check data, run the bundled job."""

from __future__ import annotations

import inspect
import textwrap
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefopt.losses import Need, available
from prefopt.losses.registry import describe_arguments

app = typer.Typer(help="Preference optimization for language models.", no_args_is_help=True, add_completion=False)

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="How the data names its columns: prompt=question chosen=good rejected=bad"),
]


@app.command()
def losses(
    name: Annotated[str | None, typer.Argument(help="One objective, in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown, as the README has it.")] = False,
) -> None:
    """List the objectives, or explain one."""
    known = available()
    if markdown:
        print(losses_table())
        return
    if name is None:
        table = Table(show_lines=True)
        for heading in ("name", "formula", "data", "needs", "paper"):
            table.add_column(heading, no_wrap=heading in ("name", "paper"))
        for name_, formula, data, needs, _, paper, _ in _rows():
            table.add_row(*map(escape, (name_, formula, data, needs, paper)))
        _console().print(table)
        _console().print('Combine them: --loss "dpo(beta=0.1) + 0.2*sft". `prefopt losses NAME` explains one.')
        return
    if name not in known:
        from prefopt.losses import LossSyntaxError, parse

        try:
            _console().print(Text(str(parse(name))))
        except LossSyntaxError as error:
            _fail(str(error))
        return
    cls = known[name]
    _console().print(Text(f"{name}({describe_arguments(cls)})", style="bold"))
    _console().print(Text(textwrap.dedent("    " + (inspect.getdoc(cls) or ""))))
    _console().print(Text(f"Formula: {cls.formula}\nNeeds of the scorer: {_needs(cls.needs)}"))
    if cls.paper:
        _console().print(Text(f"Paper: https://arxiv.org/abs/{cls.paper}"))


_HEADINGS = ("name", "formula", "data", "needs", "arguments", "paper", "TRL's name")


def _rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, cls in available().items():
        data = "pairs" if cls.paired else " and ".join(cls.roles)
        rows.append((name, cls.formula, data, _needs(cls.needs), describe_arguments(cls), cls.paper, cls.trl_name))
    return rows


BAR = r"\|"
"""A vertical bar inside a Markdown table cell."""


def losses_table() -> str:
    """The registered objectives as a Markdown table."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|" + " --- |" * len(_HEADINGS)]
    for name, formula, data, needs, arguments, paper, trl_name in _rows():
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        cells = (f"`{name}`", f"`{formula}`", data, needs, f"`{arguments}`", link, trl_name and f"`{trl_name}`")
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(lines)


@app.command(context_settings={"allow_extra_args": True})
def check(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="A file, a save_to_disk folder or a Hub name; a.jsonl:0.7,b.jsonl:0.3")],
    columns: Columns = None,
    split: Annotated[str, typer.Option(help="The split to check.")] = "train",
    model: Annotated[str | None, typer.Option(help="Check lengths with this model's tokenizer.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt and completion, in tokens.")] = None,
) -> None:
    """Validate a preference data set and print what is wrong with it."""
    from prefopt.data import DataError, kind, load_preferences, mix, normalise, parse_columns, parse_sources, validate

    if max_length is not None and model is None:
        _fail("--max-length counts tokens: name the tokenizer with --model")
    try:
        # What follows the first pair of --columns arrives as extra words.
        words = [word for given in columns or [] for word in given.split()]
        mapping = parse_columns([*words, *context.args])
        loaded = {
            name: normalise(load_preferences(name, split=split, columns=mapping)) for name, _ in parse_sources(data)
        }
        dataset = mix(loaded) if len(loaded) > 1 else next(iter(loaded.values()))
        tokenizer = None
        if model is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
        report = validate(dataset, tokenizer=tokenizer, max_length=max_length)
    except DataError as error:
        _fail(str(error))
    if report.problems:
        _console().print(report.table())
    what = "pairs" if kind(dataset) == "pair" else "labelled completions"
    _console().print(f"{report.total} {what}, {len(report.bad_rows)} that cannot be trained on.")
    if not report.ok:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Train the bundled model on the bundled pairs; takes every option of recipes/dpo.py."""
    from prefopt.recipe import main as run_recipe

    run_recipe("dpo(beta=0.1)", context.args)


def _console() -> Console:
    # Made when it is used, so that it knows the width of the terminal as it is then.
    return Console()


def _needs(needs: Need) -> str:
    return ", ".join(str(need.name).lower() for need in Need if need in needs) or "sums and lengths only"


def _fail(message: str) -> None:
    # Not wrapped: a path or a column marker broken over two lines is of no use.
    _console().print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    app()
