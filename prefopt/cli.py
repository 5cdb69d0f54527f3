"""The `prefopt` command: look objectives up, check data, run the bundled job."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from prefopt.losses import DPO, Loss, Need, Preset, available, presets
from prefopt.losses.registry import describe_arguments
from prefopt.losses.wrappers import Wrapper

app = typer.Typer(help="Preference optimization for language models.", no_args_is_help=True, add_completion=False)

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="How the data names its columns: prompt=question chosen=good rejected=bad"),
]


@app.command()
def losses(
    names: Annotated[list[str] | None, typer.Argument(help="Losses, presets or expressions to explain.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table: the README's, or of NAMES.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss and gradient of NAMES to this file (.png).")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="What a plot moves: margin (default), chosen or rejected; repeatable.")
    ] = None,
    span: Annotated[float | None, typer.Option(help="Half the width of a plot's x-axis, in nats; 40.")] = None,
) -> None:
    """List the objectives, explain some, or plot them."""
    if plot is None and (vary or span is not None):
        _fail("--vary and --span are about a picture: add --plot FILE.png")
    if plot is not None and markdown:
        _fail("--plot and --markdown exclude one another")
    if plot is not None:
        _plot(plot, names or [], vary, span)
    elif markdown:
        unknown = [name for name in names or [] if name not in available()]
        if unknown:
            _fail(f"--markdown takes names of registered losses; {unknown[0]!r} is none")
        print(objectives_table([available()[name] for name in names]) if names else losses_table())
    elif names:
        for place, name in enumerate(names):
            if place:
                _console().print()
            _explain(name)
    else:
        _list()


# ---- facts from the registry -------------------------------------------------------------------------------------

FAMILIES = (
    "direct", "penalised", "shapes", "discovered", "batchwise", "pointwise", "binary", "tokenwise", "reference-free",
    "cringe", "likelihood", "online", "unlearning", "kernel", "logic", "wrappers",
)  # fmt: skip
"""Families in reading order; those of other packages follow."""


@dataclass(frozen=True)
class Family:
    """The losses of one module.

    Attributes:
        name: the module's.
        about: the first line of its docstring.
        losses: in alphabetical order.
    """

    name: str
    about: str
    losses: list[type[Loss]]


def families() -> list[Family]:
    """The registered losses by family."""
    by_module: dict[str, list[type[Loss]]] = {}
    for cls in available().values():
        by_module.setdefault(cls.__module__, []).append(cls)
    found = []
    for module, members in by_module.items():
        about = (inspect.getdoc(sys.modules.get(module)) or "").partition("\n")[0]
        found.append(Family(module.rpartition(".")[2].replace("_", "-"), about, members))
    return sorted(found, key=lambda family: (*FAMILIES, family.name).index(family.name))


@dataclass(frozen=True)
class Facts:
    """What the tables say of a loss, in words."""

    formula: str
    data: str
    reference: str
    needs: str
    trl_name: str
    paper: str


def facts(cls: type[Loss]) -> Facts:
    """What holds for a loss with its default arguments."""
    if issubclass(cls, Wrapper):
        inner = DPO()
        own = cls(inner).needs & ~inner.needs
        return Facts(cls.formula, "as its loss", "as its loss", own.words if own else "", cls.trl_name, cls.paper)
    try:
        # Some declare their needs only when they are made.
        made: Loss | type[Loss] = cls()
    except TypeError:
        made = cls
    others = [str(need.name).lower() for need in Need if need in made.needs and need != Need.REFERENCE]
    needs = ", ".join([*others, *(f"column {name}" for name in made.columns)])
    return Facts(cls.formula, _data(made), _reference(made), needs, cls.trl_name, cls.paper)


def _data(loss: Loss | type[Loss]) -> str:
    return "pairs" if loss.paired else " and ".join(loss.roles)


def _reference(loss: Loss | type[Loss]) -> str:
    return "yes" if loss.needs.compares else "no"


# ---- on the terminal ---------------------------------------------------------------------------------------------


def _list() -> None:
    console = _console()
    for family in families():
        console.print(Text(f"\n{family.name}: ", style="bold").append(family.about, style="not bold"))
        for cls in family.losses:
            fact = facts(cls)
            parts = [fact.data, {"yes": "reference", "no": "no reference"}.get(fact.reference, ""), fact.needs]
            parts += [fact.trl_name and f"TRL: {fact.trl_name}", fact.paper and f"arXiv {fact.paper}"]
            _entry(f"{cls.name}({describe_arguments(cls)})", fact.formula, parts)
    console.print(Text("\npresets: ", style="bold").append("named sums that papers train with.", style="not bold"))
    for preset in presets().values():
        _entry(f"{preset.name}({describe_arguments(preset)})", str(preset.build()), [f"arXiv {preset.paper}"])
    console.print(Text('\nCombine them: --loss "dpo(beta=0.1) + 0.2*sft". `prefopt losses NAME` explains one.'))


def _entry(title: str, formula: str, parts: list[str]) -> None:
    # Continued lines are indented, so that names stand out at the left.
    _console().print(Padding(Text(title, style="cyan"), (0, 0, 0, 2), expand=False))
    _console().print(Padding(Text(formula), (0, 0, 0, 6), expand=False))
    _console().print(Padding(Text(" · ".join(filter(None, parts)), style="dim"), (0, 0, 0, 6), expand=False))


def _explain(text: str) -> None:
    from prefopt.losses import LossSyntaxError, parse

    console = _console()
    maker = available().get(text) or presets().get(text)
    if maker is None:
        try:
            _account(parse(text), re.findall(r"\w+", text))
        except LossSyntaxError as error:
            _fail(str(error))
        return
    console.print(Text(f"{text}({describe_arguments(maker)})", style="bold"))
    if isinstance(maker, Preset):
        _docstring(maker.build)
        console.print(Text("\nExpands to:"))
        _account(maker.build(), [text])
        return
    _docstring(maker)
    fact = facts(maker)
    console.print(Text(f"\nFormula: {fact.formula}\nData: {fact.data}"))
    if fact.reference == "as its loss":
        console.print(Text(f"Needs of the scorer: those of its loss{fact.needs and ', ' + fact.needs}"))
    else:
        needs = ", ".join(filter(None, ["reference" * (fact.reference == "yes"), fact.needs]))
        console.print(Text(f"Needs of the scorer: {needs or 'sums and lengths only; no reference'}"))
    console.print(Text(f"In TRL: {f'loss_type={fact.trl_name!r}' if fact.trl_name else 'no loss_type of DPOTrainer'}"))
    if fact.paper:
        console.print(Text(f"Paper: https://arxiv.org/abs/{fact.paper}"))


def _docstring(documented: object) -> None:
    """A docstring with its paragraphs filled anew, as they were filled for lines longer than a terminal's."""
    paragraphs: list[tuple[int, str]] = []
    previous = ""
    for line in (inspect.getdoc(documented) or "").splitlines():
        words = re.sub(" {3,}", "  ", line.strip())
        first = words.partition(" ")[0]
        # A line was broken where its next word, in the source 4 columns to the right, would have gone past 119.
        if previous and words and len(previous) + len(first) + 5 > 119 and not first.endswith(":"):
            indent, text = paragraphs.pop()
            paragraphs.append((indent, f"{text} {words}"))
        else:
            paragraphs.append((len(line) - len(line.lstrip()), words))
        previous = line
    for indent, text in paragraphs:
        _console().print(Padding(Text(text), (0, 0, 0, indent), expand=False) if text else "")


def _account(loss: Loss, words: list[str]) -> None:
    """An expression with every argument, and what it asks for; `words` may name presets that it came from."""
    console = _console()
    console.print(Text(str(loss), style="bold"))
    console.print(Text(f"\nData: {_data(loss)}"))
    for role in (*loss.roles, "mismatched"):
        needs = loss.needs_of(role)
        if needs or role in loss.roles:
            console.print(Text(f"Needs of the scorer for {role} completions: {needs.words}"))
    if loss.columns:
        console.print(Text(f"Columns of the data: {', '.join(loss.columns)}"))
    console.print(Text(f"Reference model: {_reference(loss)}"))
    papers = {name: presets()[name].paper for name in words if name in presets()}
    papers |= {part.name: part.paper for part in loss.modules() if isinstance(part, Loss)}
    for name, paper in papers.items():
        if paper:
            console.print(Text(f"Paper of {name}: https://arxiv.org/abs/{paper}"))


def _plot(path: Path, names: list[str], vary: list[str] | None, span: float | None) -> None:
    from prefopt.losses import LossSyntaxError
    from prefopt.plots import SPAN, PlotError, draw, scale_hints, trace

    try:
        lines = trace(names, vary or ["margin"], SPAN if span is None else span)
        draw(lines, path)
    except (PlotError, LossSyntaxError) as error:
        _fail(str(error))
    for hint in scale_hints(lines):
        _console().print(Text(hint))
    _console().print(Text(f"{path}: {len(lines)} curves"), soft_wrap=True)


# ---- as Markdown -------------------------------------------------------------------------------------------------


def losses_table() -> str:
    """The families and the names of their objectives, for the README."""
    rows = []
    for family in families():
        names = []
        for cls in family.losses:
            fact = facts(cls)
            marks = "ᵀ" * bool(fact.trl_name) + "°" * (fact.reference == "no")
            names.append(_link(f"`{cls.name}`", fact.paper) + marks)
        rows.append((f"[{family.name}](docs/objectives.md#{family.name})", family.about, ", ".join(names)))
    named = ", ".join(_link(f"`{preset.name}`", preset.paper) for preset in presets().values())
    rows.append(("[presets](docs/objectives.md#presets)", "Sums of the above that papers train with.", named))
    return _markdown(("family", "what it holds", "objectives"), rows)


def objectives_table(members: list[type[Loss]]) -> str:
    """Everything the registry knows of some objectives, for docs/objectives.md."""
    rows = []
    for cls in members:
        fact = facts(cls)
        title = f"`{cls.name}({describe_arguments(cls)})`"
        trl = fact.trl_name and f"`{fact.trl_name}`"
        rows.append((title, f"`{fact.formula}`", fact.data, fact.reference, fact.needs, trl, _link(fact.paper)))
    return _markdown(("objective", "formula", "data", "reference", "also needs", "in TRL", "paper"), rows)


def presets_table() -> str:
    """The presets and what they expand to, for docs/objectives.md."""
    rows = [
        (f"`{preset.name}({describe_arguments(preset)})`", f"`{preset.build()}`", _link(preset.paper))
        for preset in presets().values()
    ]
    return _markdown(("preset", "with its defaults", "paper"), rows)


def _link(text: str, paper: str | None = None) -> str:
    paper = text if paper is None else paper
    return f"[{text}](https://arxiv.org/abs/{paper})" if paper else text


def _markdown(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    # A bar would end the cell, in code too.
    lines += [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows]
    return "\n".join(lines)


BAR = r"\|"
"""A vertical bar inside a Markdown table cell."""


# ---- the other commands ------------------------------------------------------------------------------------------


@app.command()
def logic(
    name: Annotated[str | None, typer.Argument(help="A loss, a preset or an expression to decompile.")] = None,
    formula: Annotated[str | None, typer.Option(help="Or compile one: what the models should predict.")] = None,
    given: Annotated[str, typer.Option(help="The condition of --formula; rows where it is false are ruled out.")] = "",
    also: Annotated[str, typer.Option(help="What counts on both sides of --formula.")] = "",
    lattice: Annotated[Path | None, typer.Option(help="Draw the order of structures (.png, .svg, .pdf).")] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --lattice: all 256, not the named ones.")] = False,
) -> None:
    """Explain what a loss asks the models to predict, as a formula; or make a loss from one."""
    from prefopt.logic import FormulaError, decompile, from_formula
    from prefopt.logic.decompile import NoStructure
    from prefopt.logic.lattice import LatticeError, draw
    from prefopt.logic.show import explain
    from prefopt.losses import LossSyntaxError, parse

    if (name is not None) + (formula is not None) + (lattice is not None) != 1:
        _fail("give a loss's NAME, a --formula or a --lattice file, and one of them alone")
    if formula is None and (given or also):
        _fail("--given and --also belong to a --formula")
    try:
        if lattice is not None:
            _console().print(Text(draw(lattice, everything)), soft_wrap=True)
            return
        loss = from_formula(formula, given, also) if formula is not None else parse(str(name))
        _console().print(explain(decompile(loss), formula or str(loss)))
    except (FormulaError, NoStructure, LatticeError, LossSyntaxError, ValueError) as error:
        _fail(str(error))


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


@app.command()
def cache(
    prune: Annotated[
        list[str] | None, typer.Option(help="Delete the reference of this name; may be repeated.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Delete references not written to for so many days.")
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Where references are kept, if not in the usual place.")] = None,
) -> None:
    """List the references whose log-probabilities are kept on disk, or delete some."""
    from datetime import datetime
    from pathlib import Path

    from rich.table import Table

    from prefopt.scoring.cache import cache_root, entries
    from prefopt.scoring.cache import prune as delete

    root = cache_root() if folder is None else Path(folder)
    if prune or older_than is not None:
        unknown = set(prune or ()) - {entry.name for entry in entries(root)}
        if unknown:
            _fail(f"there is no reference named {', '.join(sorted(unknown))} in {root}")
        for entry in delete(prune or (), older_than, root):
            _console().print(f"deleted {entry.name}: {entry.rows} completions, {entry.size / 1e6:.1f} MB")
    found = entries(root)
    if not found:
        _console().print(f"No references are kept in {root}", soft_wrap=True)
        return
    table = Table("name", "model", "precision", "completions", "MB", "last written")
    for entry in found:
        written = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        about = (Text(str(entry.about.get(key, ""))) for key in ("model", "precision"))
        table.add_row(entry.name, *about, str(entry.rows), f"{entry.size / 1e6:.1f}", written)
    _console().print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Train the bundled model on the bundled pairs; takes every option of recipes/dpo.py."""
    from prefopt.recipe import main as run_recipe

    run_recipe("dpo(beta=0.1)", context.args)


def _console() -> Console:
    # Made when it is used, so that it knows the width of the terminal as it is then.
    return Console()


def _fail(message: str) -> None:
    # Not wrapped: a path or a column marker broken over two lines is of no use.
    _console().print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    app()
