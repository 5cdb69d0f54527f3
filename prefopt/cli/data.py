"""Commands on preference data: `prefopt check`, `prefopt select-kernel`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from prefopt.cli.app import app, console, fail, refuse_overwriting, say
from prefopt.cli.displacement import check_options, show_displacement
from prefopt.safety.errors import PrefoptError

Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="How the data names its columns: prompt=question chosen=good rejected=bad"),
]
Config = Annotated[str | None, typer.Option("--config", help="The configuration of a set that has several.")]

Layout = Annotated[
    str | None, typer.Option("--format", help="The data's layout, where it is not recognised: sharegpt, swift, ...")
]


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
    loss: Annotated[
        str | None, typer.Option(help="The loss that will train on it: sft needs neither labels nor pairs.")
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="For unlearning: the set to retain; DATA is the set to forget.")
    ] = None,
    displacement: Annotated[
        bool, typer.Option("--displacement", help="Which chosen answers may lose likelihood, by --model's states.")
    ] = False,
    keep: Annotated[
        float | None, typer.Option(help="With --displacement: the share of pairs, lowest scores first, for --out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --keep: the JSONL file to write.")] = None,
) -> None:
    """Validate a preference data set, or sets to forget and to retain, and print what is wrong with it."""
    from prefopt.data import kind, validate
    from prefopt.data.mix import parse_sources
    from prefopt.data.reading import described

    if max_length is not None and model is None:
        fail("--max-length counts tokens: name the tokenizer with --model")
    if (chat_template or chat_template_kwargs) is not None and model is None:
        fail("a chat template is applied with a tokenizer: name it with --model")
    if max_length is not None and max_length < 2:
        fail(f"--max-length must be at least 2, a token of the prompt and one of a completion, got {max_length}")
    check_options(displacement, model, keep, out)
    data, words = _words(data, columns, context.args)
    if out is not None:
        refuse_overwriting(out, *(name for name, _ in parse_sources(data)))
    options = {
        "--columns": words, "--format": layout, "--model": model, "--loss": loss, "--displacement": displacement,
    }  # fmt: skip
    of_preferences = " and ".join(name for name, value in options.items() if value)
    if retain is not None:
        if of_preferences:
            fail(f"{of_preferences} would have no effect beside --retain, which checks questions and answers or texts")
        return _check_unlearning({"forget": data, "retain": retain}, config, split)
    objective = None
    if loss is not None:
        from prefopt.losses import parse  # imports torch, which a check without a loss does not need

        objective = parse(loss)
    roles = ("chosen", "rejected") if objective is None else objective.roles
    used = () if objective is None else objective.columns
    try:
        dataset = _read(
            data, split, words, config=config, layout=layout, unlabelled=roles == ("chosen",), used=used, say=say
        )
    except PrefoptError:
        if not (_is_for_unlearning(data, config, split) or (loss is None and _holds_questions(data, config, split))):
            raise
        if of_preferences:
            say(f"Not used for a set to forget or to retain: {of_preferences}")
        return _check_unlearning({"forget or retain": data}, config, split)
    for line in described(dataset, used):
        say(line)
    tokenizer = None
    if model is not None:
        from prefopt.models.load import load_tokenizer

        kwargs = _json_object(chat_template_kwargs)
        tokenizer = load_tokenizer(model, chat_template=chat_template, chat_template_kwargs=kwargs)
    report = validate(dataset, tokenizer=tokenizer, max_length=max_length, roles=roles)
    if report.problems:
        console().print(report.table())
    for note in report.notes:
        say(note)
    what = {"pair": "pairs", "unpaired": "labelled completions", "group": "groups"}[kind(dataset)]
    say(f"{report.total} {what}, {len(report.bad_rows)} that cannot be trained on.")
    if objective is not None:
        from prefopt.trainer.checks import check_data

        check_data(objective, dataset)
    if displacement:
        if what != "pairs":
            fail(f"--displacement compares the two completions of a pair, and these are {what}")
        show_displacement(dataset, report.bad_rows, _network(model), keep, out)
    if not report.ok:
        raise typer.Exit(1)


def _is_for_unlearning(data: str, config: str | None, split: str) -> bool:
    """Whether every row is a plain text, or any has answers to measure forgetting with."""
    from prefopt.unlearning.data import read_questions

    try:
        rows = read_questions(data, config, split)
    except (PrefoptError, OSError, ValueError):
        return False
    return any(row.wrong or row.paraphrase for row in rows) or all(not row.question for row in rows)


def _holds_questions(data: str, config: str | None, split: str) -> bool:
    """Whether every row has a question and an answer under these names: what likelihood or unlearning trains on."""
    from prefopt.data import load_preferences
    from prefopt.unlearning.data import read_questions, source_of

    try:
        read_questions(data, config, split)
        path, config, split = source_of(data, config, split)
        names = load_preferences(path, config=config, split=split).column_names
    except (PrefoptError, OSError, ValueError):
        return False
    if not {"question", "answer"} <= set(names):
        return False
    say(
        "Read as a set to forget or to retain. To train on its answers by likelihood: --loss sft --columns "
        "prompt=question completion=answer"
    )
    return True


def _check_unlearning(names: dict[str, str], config: str | None, split: str) -> None:
    """Print what is wrong with sets for unlearning.

    Args:
        names: of the sets, by what they are for.
        config: of the sets whose name carries neither a configuration nor a split.
        split: likewise.
    """
    from prefopt.unlearning.check import check_both, check_set
    from prefopt.unlearning.data import read_questions

    sets = {what: read_questions(name, config, split) for what, name in names.items()}
    found = [(what, finding) for what, rows in sets.items() for finding in check_set(rows)]
    if len(sets) == 2:
        found += [("both", finding) for finding in check_both(sets["forget"], sets["retain"])]
    for what, finding in found:
        first = ", ".join(map(str, finding.rows[:3])) + (", ..." if len(finding.rows) > 3 else "")
        say(f"{what}: {len(finding.rows)} rows {finding.text} (rows from 0: {first})")
    for what, rows in sets.items():
        texts = sum(not row.question for row in rows)
        say(f"{what}: {len(rows)} rows, {len(rows) - texts} questions and {texts} plain texts.")
    if any(finding.fatal for _, finding in found):
        raise typer.Exit(1)


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        fail(f'--chat-template-kwargs must be a JSON object such as {{"enable_thinking": false}}, got {text}')
    return dict(value)


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

    from prefopt.analysis.kernel_choice.choose import HIDDEN, choose
    from prefopt.analysis.kernel_choice.show import command, explain
    from prefopt.demo.data import load_demo
    from prefopt.safety.noise import quiet_libraries

    quiet_libraries()
    if model is not None and not (verify or embeddings == HIDDEN):
        fail("--model is not used: it is for --verify and for --embeddings hidden")
    if data is None and (columns or split != "train"):
        fail("--columns and --split are about DATA, and the bundled pairs take neither")
    if json_file is not None and not json_file.parent.is_dir():
        fail(f"--json: there is no folder {json_file.parent}")
    if json_file is not None and json_file.is_dir():
        fail(f"--json: {json_file} is a folder: name a file in it")
    pairs = load_demo("train")
    if data is not None:
        data, words = _words(data, columns, context.args)
        pairs = _read(data, split, words, weighted=True)
    choice = choose(
        pairs, embeddings, rows=rows, model=lambda: _network(model), verify=verify,
        shown=lambda outcomes, total: track(outcomes, "Training", total, console=console(), transient=True),
    )  # fmt: skip
    console().print(explain(choice, data or "bundled pairs"))
    say(command(choice))
    if json_file is not None:
        json_file.write_text(json.dumps(choice.as_dict(), indent=2) + "\n", encoding="utf-8")


def _words(data: str, columns: list[str] | None, rest: list[str]) -> tuple[str, list[str]]:
    """DATA and the pairs of --columns in either order: `--columns a=x b=y DATA` has DATA at its end."""
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
    unlabelled: bool = False,
    used: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """The normalised rows of a data set, or of a mixture; `columns` are the words of --columns, `used` a loss's own.

    Each row comes once; with `weighted`, a mixture's weights are applied.
    """
    from datasets import disable_progress_bars

    from prefopt.data import in_proportion, mix, parse_columns, parse_sources, read_preferences

    disable_progress_bars()
    mapping = parse_columns(" ".join(columns).split())
    sources = dict(parse_sources(data))
    loaded = {
        name: read_preferences(
            name,
            config=config,
            split=split,
            columns=mapping,
            format=layout,
            used=used,
            unlabelled=unlabelled,
            say=say,
        )
        for name in sources
    }
    if weighted and len(loaded) > 1 and None not in sources.values():
        loaded = in_proportion(loaded, [weight or 0.0 for weight in sources.values()])
    return mix(loaded) if len(loaded) > 1 else next(iter(loaded.values()))


def _network(name: str | None) -> tuple[Any, Any]:
    """A model in float32 with its tokenizer; the bundled one if no name is given."""
    import torch

    from prefopt.models.bundled import resolve_demo_model
    from prefopt.models.load import load_model, load_tokenizer

    name = str(resolve_demo_model(say=say)) if name is None else name
    tokenizer = load_tokenizer(name)  # first: its errors say what was looked for
    return load_model(name, {"dtype": torch.float32}), tokenizer
