"""The `prefopt` command: look objectives up, check data, plan a run, run the bundled job, merge adapters.

What a command needs is imported inside it, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from prefopt import __version__
from prefopt.noise import quiet_warnings
from prefopt.short_errors import short_errors

if TYPE_CHECKING:
    from prefopt.losses import Loss

app = typer.Typer(
    help="Preference optimization for language models.",
    no_args_is_help=True,
    add_completion=False,
    # `--max_length` is `--max-length`, as in the recipes.
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="How the data names its columns: prompt=question chosen=good rejected=bad"),
]
Config = Annotated[str | None, typer.Option("--config", help="The configuration of a set that has several.")]
Layout = Annotated[
    str | None, typer.Option("--format", help="The data's layout, where it is not recognised: sharegpt, swift, ...")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prefopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    # Without a docstring: the help is the app's.
    pass


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
    from prefopt.catalogue import losses_table, objectives_table
    from prefopt.losses import available

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


# ---- on the terminal ---------------------------------------------------------------------------------------------


def _list() -> None:
    from prefopt.catalogue import facts, families
    from prefopt.losses import presets
    from prefopt.losses.registry import describe_arguments

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
    from prefopt.catalogue import facts
    from prefopt.losses import LossSyntaxError, Preset, available, parse, presets
    from prefopt.losses.registry import describe_arguments

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
    from prefopt.catalogue import data_of, reference_of
    from prefopt.losses import Loss, presets

    console = _console()
    console.print(Text(str(loss), style="bold"))
    console.print(Text(f"\nData: {data_of(loss)}"))
    for role in (*loss.roles, "mismatched"):
        needs = loss.needs_of(role)
        if needs or role in loss.roles:
            console.print(Text(f"Needs of the scorer for {role} completions: {needs.words}"))
    if loss.columns:
        console.print(Text(f"Columns of the data: {', '.join(loss.columns)}"))
    console.print(Text(f"Reference model: {reference_of(loss)}"))
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
    config: Config = None,
    layout: Layout = None,
    model: Annotated[str | None, typer.Option(help="Check lengths with this model's tokenizer.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt and completion, in tokens.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A Jinja template, or a file with one.")] = None,
    chat_template_kwargs: Annotated[str | None, typer.Option(help="Arguments of the template, as JSON.")] = None,
) -> None:
    """Validate a preference data set and print what is wrong with it."""
    from prefopt.data import DataError, kind, validate
    from prefopt.data.reading import described

    if max_length is not None and model is None:
        _fail("--max-length counts tokens: name the tokenizer with --model")
    if (chat_template or chat_template_kwargs) is not None and model is None:
        _fail("a chat template is applied with a tokenizer: name it with --model")
    if max_length is not None and max_length < 2:
        _fail(f"--max-length must be at least 2, a token of the prompt and one of a completion, got {max_length}")
    try:
        data, words = _words(data, columns, context.args)
        dataset = _read(data, split, words, config=config, layout=layout, say=_say)
        for line in described(dataset):
            _say(line)
        tokenizer = None
        if model is not None:
            from prefopt.models import load_tokenizer

            kwargs = _json_object(chat_template_kwargs)
            tokenizer = load_tokenizer(model, chat_template=chat_template, chat_template_kwargs=kwargs)
        report = validate(dataset, tokenizer=tokenizer, max_length=max_length)
    except (DataError, OSError) as error:
        _fail(str(error))
    if report.problems:
        _console().print(report.table())
    for note in report.notes:
        _say(note)
    what = "pairs" if kind(dataset) == "pair" else "labelled completions"
    _console().print(f"{report.total} {what}, {len(report.bad_rows)} that cannot be trained on.")
    if not report.ok:
        raise typer.Exit(1)


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        _fail(f'--chat-template-kwargs must be a JSON object such as {{"enable_thinking": false}}, got {text}')
    return dict(value)


@app.command()
def pair(
    data: Annotated[str, typer.Argument(help="A file, a save_to_disk folder or a Hub name.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt, unless the answers hold it.")] = None,
    first: Annotated[str | None, typer.Option(help="Column of the first of two answers.")] = None,
    second: Annotated[str | None, typer.Option(help="Column of the second.")] = None,
    winner: Annotated[
        str | None, typer.Option(help="Column that says which is better (of a list: its place).")
    ] = None,
    first_wins: Annotated[str, typer.Option(help="Its values that mean the first, with commas.")] = "",
    second_wins: Annotated[str, typer.Option(help="Its values that mean the second; all others are ties.")] = "",
    answers: Annotated[str | None, typer.Option(help="Column of answers: a list, or one a row.")] = None,
    text: Annotated[str | None, typer.Option(help="Field of an answer with its text, if it is an object.")] = None,
    rank: Annotated[str | None, typer.Option(help="Field or column of ranks (or A,B): lowest is best.")] = None,
    score: Annotated[str | None, typer.Option(help="Field or column of scores (or A,B): highest is best.")] = None,
    every: Annotated[bool, typer.Option("--every", help="All pairs of a row, not only best and worst.")] = False,
    split: Annotated[str, typer.Option(help="The split to pair.")] = "train",
    config: Config = None,
) -> None:
    """Write pairs (prompt, chosen, rejected) from rows that compare or rank answers."""
    from prefopt.data import DataError, load_preferences
    from prefopt.data.rankings import Pairing, write_pairs

    better, worse = (
        tuple(value.strip() for value in given.split(",") if value) for given in (first_wins, second_wins)
    )
    how = Pairing(prompt, first, second, winner, better, worse, answers, text, rank, score, every)
    try:
        found = write_pairs(load_preferences(data, split=split, config=config), how, out)
    except (DataError, OSError) as error:
        _fail(str(error))
    _say(
        f"{out}: {found['pairs']} pairs from {found['rows']} rows; {found['rows without a pair']} rows made none (a "
        f"tie, or an answer is missing). Look at them: prefopt check {out}"
    )


@app.command("select-kernel", context_settings={"allow_extra_args": True})
def select_kernel(
    context: typer.Context,
    data: Annotated[str | None, typer.Argument(help="As for `check`; the bundled pairs if left out.")] = None,
    embeddings: Annotated[
        str, typer.Option(help="An encoder's name or folder; `columns` of the data; `hidden` states of the model.")
    ] = "all-MiniLM-L6-v2",
    rows: Annotated[
        int | None, typer.Option(min=1, help="Pairs to measure, drawn at random; 1000, or 240 of `hidden` states.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Train all 28 pairs briefly and rank the one chosen.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="For --verify and `hidden`; the bundled one if left out.")] = None,
    columns: Columns = None,
    split: Annotated[str, typer.Option(help="The split to measure.")] = "train",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found here as well.")] = None,
) -> None:
    """Measure which kernel and divergence of `kernel_dpo` suit a preference data set."""

    from rich.progress import track

    from prefopt.analysis.kernels import HIDDEN, choose
    from prefopt.analysis.show import command, explain
    from prefopt.data import DataError
    from prefopt.demo.data import load_demo
    from prefopt.demo.model import DemoModelError

    if model is not None and not (verify or embeddings == HIDDEN):
        _fail("--model is not used: it is for --verify and for --embeddings hidden")
    if data is None and (columns or split != "train"):
        _fail("--columns and --split are about DATA, and the bundled pairs take neither")
    if json_file is not None and not json_file.parent.is_dir():
        _fail(f"--json: there is no folder {json_file.parent}")
    if json_file is not None and json_file.is_dir():
        _fail(f"--json: {json_file} is a folder: name a file in it")
    try:
        pairs = load_demo("train")
        if data is not None:
            data, words = _words(data, columns, context.args)
            pairs = _read(data, split, words, weighted=True)
        choice = choose(
            pairs, embeddings, rows=rows, model=lambda: _network(model), verify=verify,
            shown=lambda outcomes, total: track(outcomes, "Training", total, console=_console(), transient=True),
        )  # fmt: skip
    except (DataError, DemoModelError, OSError, ValueError) as error:
        _fail(str(error))
    _console().print(explain(choice, data or "bundled pairs"))
    _console().print(Text(command(choice)), soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(choice.as_dict(), indent=2) + "\n", encoding="utf-8")


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

    from prefopt.scoring.cache import cache_root, entries
    from prefopt.scoring.cache import prune as delete
    from prefopt.tables import table

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
    made = table("name", "model", "precision", "completions", "MB", "last written", right=("completions", "MB"))
    for entry in found:
        written = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        about = (Text(str(entry.about.get(key, ""))) for key in ("model", "precision"))
        made.add_row(entry.name, *about, str(entry.rows), f"{entry.size / 1e6:.1f}", written)
    _console().print(made)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of a saved adapter.")],
    output: Annotated[
        str | None, typer.Option(help="Where to save the merged model; the adapter's name and -merged.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model to fold into, if not the one the adapter names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the merged weights: float32, bfloat16, float16.")] = None,
) -> None:
    """Fold an adapter into its base model, and compare the two."""
    from prefopt.merge import MergeError
    from prefopt.merge import merge as fold

    try:
        merged = fold(adapter, output, base, dtype)
    except MergeError as error:
        _fail(str(error))
    precision = str(merged.dtype).removeprefix("torch.")
    _console().print(
        f"Merged into {merged.base} ({precision}). On {merged.tokens} tokens the merged model differs from the "
        f"adapter by {merged.largest:.2g} nats at most, {merged.mean:.2g} on average; the adapter moves the base by "
        f"up to {merged.moved:.2g}.",
        soft_wrap=True,
    )
    if merged.moved == 0:
        _console().print("The adapter changes nothing: is it the one you meant?")
    _console().print(f"Saved to {merged.folder}", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Train the bundled model on the bundled pairs, or yours: --model_name_or_path, --dataset_name, --loss ..."""
    from prefopt.recipe import main as run_recipe

    with short_errors():
        run_recipe("dpo(beta=0.1)", context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="--model NAME [OPTIONS; --help lists them]",
)
def plan(context: typer.Context) -> None:
    """Estimate the memory of every way to train a model, and say which to take on given GPUs."""
    from prefopt.scaling import main as show_plan

    try:
        show_plan(context.args)
    except (OSError, ValueError) as error:
        _fail(str(error))


def _words(data: str, columns: list[str] | None, rest: list[str]) -> tuple[str, list[str]]:
    """DATA and the pairs of --columns, whichever of them comes first: `--columns a=x b=y DATA` has DATA at its end."""
    words = [data, *rest]
    named = [word for word in words if "=" not in word or Path(word).exists()]
    if columns and len(named) == 1:
        data = named[0]
        words.remove(data)
        return data, [*columns, *words]
    return data, [*(columns or []), *rest]


def _read(
    data: str,
    split: str,
    columns: list[str],
    weighted: bool = False,
    config: str | None = None,
    layout: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """The normalised rows of a data set, or of a mixture; `columns` are the words of --columns.

    Each row comes once; `weighted` keeps of a mixture with weights what they say.
    """
    from datasets import disable_progress_bars

    from prefopt.data import in_proportion, mix, parse_columns, parse_sources, read_preferences

    disable_progress_bars()
    mapping = parse_columns([word for given in columns for word in given.split()])
    sources = dict(parse_sources(data))
    loaded = {
        name: read_preferences(name, config=config, split=split, columns=mapping, format=layout, say=say)
        for name in sources
    }
    if weighted and len(loaded) > 1 and None not in sources.values():
        loaded = in_proportion(loaded, [weight or 0.0 for weight in sources.values()])
    return mix(loaded) if len(loaded) > 1 else next(iter(loaded.values()))


def _network(name: str | None) -> tuple[Any, Any]:
    """A model in float32 with its tokenizer; the bundled one if no name is given."""
    import torch

    from prefopt.demo.model import resolve_demo_model
    from prefopt.models import load_model, load_tokenizer

    name = str(resolve_demo_model(say=lambda line: _console().print(line, soft_wrap=True))) if name is None else name
    tokenizer = load_tokenizer(name)  # first: its errors say what was looked for
    return load_model(name, {"dtype": torch.float32}), tokenizer


def _say(line: str) -> None:
    _console().print(Text(line), soft_wrap=True)


def _console() -> Console:
    # Made when it is used, so that it knows the width of the terminal as it is then.
    return Console()


def _fail(message: str) -> None:
    # Not wrapped: a path or a column marker broken over two lines is of no use.
    _console().print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """The command line; errors of prefopt's own end it with their message alone."""
    quiet_warnings()
    with short_errors():
        app()


if __name__ == "__main__":
    main()
