"""Commands that look objectives up: `prefopt losses`, `prefopt logic`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from prefopt.losses import Loss

from prefopt.cli.app import app, console, fail, say

LISTING = Path(__file__).with_name("losses.json")
"""`listing` in a file, because importing torch takes two seconds. `scripts/write_objectives_table.py` writes it."""


@app.command()
def losses(
    names: Annotated[list[str] | None, typer.Argument(help="Losses, presets or expressions to explain.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table of all, or of NAMES.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw loss and gradient of NAMES to this file (.png).")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="What a plot moves: margin (default), chosen or rejected; repeatable.")
    ] = None,
    span: Annotated[float | None, typer.Option(help="Half the width of a plot's x-axis, in nats; 40.")] = None,
    loss_file: Annotated[
        Path | None, typer.Option(help="A Python file of yours with losses; without NAMES, those are explained.")
    ] = None,
) -> None:
    """List the objectives, explain some, or plot them."""
    if not (names or markdown or plot or vary or span is not None or loss_file):
        _list()
        return
    from prefopt.catalogue.tables import losses_table, objectives_table
    from prefopt.losses import available, register_file

    if loss_file is not None:
        registered = register_file(loss_file)
        names = names or list(registered.names)
    if plot is None and (vary or span is not None):
        fail("--vary and --span are about a picture: add --plot FILE.png")
    if plot is not None and markdown:
        fail("--plot and --markdown exclude one another")
    if plot is not None:
        _plot(plot, names or [], vary, span)
    elif markdown:
        unknown = [name for name in names or [] if name not in available()]
        if unknown:
            fail(f"--markdown takes names of registered losses; {unknown[0]!r} is not one")
        print(objectives_table([available()[name] for name in names]) if names else losses_table())
    else:
        for place, name in enumerate(names or ()):
            console().print(end="\n" if place else "")
            _explain(name)


def listing() -> list[dict[str, Any]]:
    """What the list shows, from the registry: families, and of each objective its title, formula and facts."""
    from prefopt.catalogue.tables import facts, families
    from prefopt.losses import presets
    from prefopt.losses.registry import describe_arguments

    groups = []
    for family in families():
        entries = []
        for cls in family.losses:
            fact = facts(cls)
            parts = [fact.data, {"yes": "reference", "no": "no reference"}.get(fact.reference, ""), fact.needs]
            parts += [fact.trl_name and f"TRL: {fact.trl_name}", fact.paper and f"arXiv {fact.paper}"]
            entries.append([f"{cls.name}({describe_arguments(cls)})", fact.formula, " · ".join(filter(None, parts))])
        groups.append({"name": family.name, "about": family.about, "objectives": entries})
    sums = [
        [f"{preset.name}({describe_arguments(preset.build)})", str(preset.build()), f"arXiv {preset.paper}"]
        for preset in presets().values()
    ]
    return [*groups, {"name": "presets", "about": "named sums that papers train with.", "objectives": sums}]


def _list() -> None:
    screen = console()
    for group in json.loads(LISTING.read_text(encoding="utf-8")):
        screen.print(Text(f"\n{group['name']}: ", style="bold").append(group["about"], style="not bold"))
        for title, formula, known in group["objectives"]:
            screen.print(*_entry(title, formula, known))
    screen.print(Text('\nCombine them: --loss "dpo(beta=0.1) + 0.2*sft". `prefopt losses NAME` explains one.'))


def _entry(title: str, formula: str, known: str) -> list[Padding]:
    lines = [Text(title, style="cyan"), Text(formula), Text(known, style="dim")]
    # Continued lines are indented, so that names stand out at the left.
    return [Padding(line, (0, 0, 0, indent), expand=False) for line, indent in zip(lines, (2, 6, 6), strict=True)]


def _explain(text: str) -> None:
    from prefopt.catalogue.tables import facts
    from prefopt.losses import Preset, available, parse, presets
    from prefopt.losses.registry import describe_arguments, makers

    screen = console()
    maker = available().get(text) or presets().get(text)
    if maker is None:
        _account(parse(text), re.findall(r"\w+", text))
        return
    screen.print(Text(f"{text}({describe_arguments(makers()[text])})", style="bold"))
    if isinstance(maker, Preset):
        _docstring(maker.build)
        screen.print(Text("\nExpands to:"))
        _account(maker.build(), [text])
        return
    _docstring(maker)
    fact = facts(maker)
    formula = fact.formula and f"Formula: {fact.formula}\n"
    screen.print(Text(f"\n{formula}Data: {fact.data}"))
    if fact.reference == "as its loss":
        screen.print(Text(f"Needs of the scorer: those of its loss{fact.needs and ', ' + fact.needs}"))
    else:
        needs = ", ".join(filter(None, ["reference" * (fact.reference == "yes"), fact.needs]))
        screen.print(Text(f"Needs of the scorer: {needs or 'sums and lengths only; no reference'}"))
    screen.print(Text(f"In TRL: {f'loss_type={fact.trl_name!r}' if fact.trl_name else 'no loss_type of DPOTrainer'}"))
    if fact.paper:
        screen.print(Text(f"Paper: https://arxiv.org/abs/{fact.paper}"))


def _docstring(documented: object) -> None:
    """A docstring whose paragraphs fill a terminal's lines; in the source they fill longer ones."""
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
        console().print(Padding(Text(text), (0, 0, 0, indent), expand=False) if text else "")


def _account(loss: Loss, words: list[str]) -> None:
    """An expression with every argument, and what it asks for; `words` may name presets that it came from."""
    from prefopt.catalogue.tables import data_of, reference_of
    from prefopt.losses import Loss, presets

    screen = console()
    screen.print(Text(str(loss), style="bold"))
    screen.print(Text(f"\nData: {data_of(loss)}"))
    for role in (*loss.roles, "mismatched"):
        needs = loss.needs_of(role)
        if needs or role in loss.roles:
            screen.print(Text(f"Needs of the scorer for {role} completions: {needs.words}"))
    if loss.columns:
        screen.print(Text(f"Columns of the data: {', '.join(loss.columns)}"))
    screen.print(Text(f"Reference model: {reference_of(loss)}"))
    papers = {name: presets()[name].paper for name in words if name in presets()}
    papers |= {part.name: part.paper for part in loss.modules() if isinstance(part, Loss)}
    for name, paper in papers.items():
        if paper:
            screen.print(Text(f"Paper of {name}: https://arxiv.org/abs/{paper}"))


def _plot(path: Path, names: list[str], vary: list[str] | None, span: float | None) -> None:
    from prefopt.catalogue.plots import SPAN, draw, scale_hints, trace

    lines = trace(names, vary or ["margin"], SPAN if span is None else span)
    draw(lines, path)
    for hint in scale_hints(lines):
        console().print(Text(hint))
    say(f"{path}: {len(lines)} curves")


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
    from prefopt.logic import decompile, from_formula
    from prefopt.logic.lattice import draw
    from prefopt.logic.show import explain
    from prefopt.losses import parse

    if (name is not None) + (formula is not None) + (lattice is not None) != 1:
        fail("give exactly one of: a loss's NAME, a --formula, a --lattice file")
    if formula is None and (given or also):
        fail("--given and --also belong to a --formula")
    if lattice is not None:
        say(draw(lattice, everything))
        return
    loss = from_formula(formula, given, also) if formula is not None else parse(str(name))
    console().print(explain(decompile(loss), formula or str(loss)))
