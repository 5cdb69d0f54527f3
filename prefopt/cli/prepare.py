"""`prefopt unlearn prepare`: rows to forget, and to measure with, from a user's own documents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli import generators as of
from prefopt.cli.app import console, fail, say
from prefopt.cli.unlearn import unlearn

if TYPE_CHECKING:
    from prefopt.generation.samples import Generator
    from prefopt.unlearning.prepare import Passage, Prepared

_WRITTEN, REFUSED = "What is written", "refused.jsonl"


@unlearn.command()
def prepare(
    context: typer.Context,
    docs: Annotated[list[Path], typer.Argument(help="Files (.txt, .md, .jsonl), or folders with such files.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file of rows to write, for --forget_set and the like.")],
    model: of.Model = None,
    questions: Annotated[int, typer.Option(min=1, help="About each passage, at most.", rich_help_panel=_WRITTEN)] = 3,
    wrong: Annotated[int, typer.Option(min=1, help="Wrong answers of each row.", rich_help_panel=_WRITTEN)] = 5,
    attempts: Annotated[
        int, typer.Option(min=1, help="Of a request whose reply cannot be used.", rich_help_panel=_WRITTEN)
    ] = 3,
    passage_characters: Annotated[
        int, typer.Option(min=200, help="Documents are cut into passages of this size.", rich_help_panel=_WRITTEN)
    ] = 1200,
    text_column: Annotated[
        str, typer.Option(help="The column of .jsonl files with the text.", rich_help_panel=_WRITTEN)
    ] = "text",
    prompts: Annotated[
        Path | None, typer.Option(help="A YAML file with prompts of your own.", rich_help_panel=_WRITTEN)
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="For the generator's replies; OUT.replies if left out.")] = None,
    temperature: of.Temperature = 0.7,
    top_p: of.TopP = 0.95,
    top_k: of.TopK = 0,
    max_new_tokens: of.MaxNewTokens = 512,
    seed: of.Seed = 0,
    rows: of.Rows = None,
    dtype: of.Dtype = "auto",
    chat_template: of.ChatTemplate = None,
    url: of.Url = None,
    served_as: of.ServedAs = None,
    key_variable: of.KeyVariable = "OPENAI_API_KEY",
    concurrency: of.Concurrency = 16,
    extra: of.Extra = None,
    file: Annotated[
        Path | None, typer.Option(help="Replies of another program to our prompts.", rich_help_panel=of.OTHER)
    ] = None,
    vllm: of.Vllm = False,
) -> None:
    """Write questions, paraphrases and wrong answers about your own documents, in the schema of TOFU.

    Any generator writes them: a model on this machine, a server, a file. Its replies are read by fixed rules; what
    cannot be used is counted, and stands with the reason in refused.jsonl. A command that was stopped and is repeated
    continues, and ends with the same rows.
    """
    from accelerate import PartialState

    from prefopt.generation.samples import SamplingSettings
    from prefopt.safety.jsonl import write_jsonl
    from prefopt.unlearning.prepare import Prompts, Wanted

    of.check_source(context, url, file, vllm)
    of.check_top_p(top_p)
    folder = out.with_name(f"{out.name}.replies") if folder is None else folder
    _check_out(out, folder, docs)
    is_main = PartialState().is_main_process
    tell = say if is_main else lambda line: None
    templates = Prompts.read(prompts)
    passages = _passages(docs, text_column, passage_characters, tell)
    chat = True
    source: Generator
    if file is not None:
        source = _from_file(file)
    elif url is not None:
        source = of.Server(url, served_as, key_variable, concurrency, extra).generator(model, chat_template)
    else:
        local = of.Local(model, dtype, rows, chat_template, vllm)
        chat, source = bool(local.tokenizer.chat_template), local.generator()
    settings = SamplingSettings(1, temperature, top_p, top_k, max_new_tokens, (), seed)
    prepared = _run(passages, source, settings, folder, Wanted(questions, wrong, attempts, templates, chat), is_main)
    if not is_main:
        return
    write_jsonl(folder / REFUSED, map(asdict, prepared.refusals))
    if prepared.rows:
        write_jsonl(out, prepared.rows)
    _summarise(prepared, out, folder, wrong)
    if file is not None:
        _name_unanswered(prepared, file, folder)
    if not prepared.rows and not any(prepared.unanswered.values()):
        fail(f"no row is complete, so {out} was not written: {folder / REFUSED} has what the generator wrote")


def _run(
    passages: list[Passage], source: Generator, settings: Any, folder: Path, wanted: Any, is_main: bool
) -> Prepared:
    from rich.progress import Progress

    from prefopt.unlearning.prepare import prepare as write

    try:
        with Progress(console=console(), transient=True, disable=not is_main) as progress:
            task = progress.add_task("")
            return write(
                passages, source, settings, folder, wanted,
                lambda stage, total, done: progress.update(task, description=stage, total=total, completed=done),
            )  # fmt: skip
    finally:
        source.close()


def _check_out(out: Path, folder: Path, docs: list[Path]) -> None:
    if out.suffix != ".jsonl":
        fail(f"--out {out} must end with .jsonl: rows are JSON lines")
    for path in docs:
        for option, written in (("--out", out), ("--folder", folder)):
            if path.resolve() in (written.resolve(), *written.resolve().parents):
                fail(f"{option} {written} is among the documents: name a place outside of {path}")
    if out.exists() and not folder.exists():
        fail(f"{out} exists, and no replies in {folder}: it is another file's name. Delete it, or name another --out")


def _passages(docs: list[Path], text_column: str, longest: int, tell: Any) -> list[Passage]:
    from prefopt.unlearning.prepare import passages_of, read_documents

    documents, others = read_documents(docs, text_column)
    passages, repeated = passages_of(documents, longest)
    tell(f"{len(documents)} documents, {len(passages)} passages")
    if repeated:
        tell(f"{repeated} passages repeat an earlier one; each is used once")
    if empty := sum(not document.text.strip() for document in documents):
        tell(f"{empty} documents are empty")
    if others:
        tell(f"{len(others)} files of other kinds are left out: {', '.join(path.name for path in others[:3])}"
             f"{', ...' if len(others) > 3 else ''}")  # fmt: skip
    if not passages:
        fail("there is no text in the documents")
    return passages


def _from_file(path: Path) -> Generator:
    from prefopt.generation.from_file import FileGenerator

    if not path.exists():  # the first call is there to write the prompts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return FileGenerator(path)


def _summarise(prepared: Prepared, out: Path, folder: Path, wrong: int) -> None:
    for stage, asked in prepared.asked.items():
        say(f"{stage}: {asked} requests")
        for (of_stage, reason), count in prepared.counts().items():
            if of_stage == stage:
                say(f"  not used: {count} x {reason}")
    if prepared.refusals:
        say(f"What is not used, with the reason: {folder / REFUSED}")
    if prepared.rows:
        count = len(prepared.rows)
        say(f"{out}: {count} rows, each with its question and answer in other words and {wrong} wrong answers")
        say(f"Look at some before you trust them. Then: recipes/unlearn.py --forget_set {out} --retain_set ...")


def _name_unanswered(prepared: Prepared, file: Path, folder: Path) -> None:
    """Write the prompts that the file lacks, for the other program."""
    from prefopt.safety.jsonl import write_jsonl

    for stage, rows in prepared.unanswered.items():
        path = folder / f"{stage.replace(' ', '-')}.prompts.jsonl"
        if not rows:
            path.unlink(missing_ok=True)
            continue
        write_jsonl(path, ({"prompt": row.prompt} for row in rows))
        say(
            f"{stage}: {file} has no reply to {len(rows)} prompts. They are in {path}: have them answered, append "
            "prompt and completion of each to the file, and repeat this command"
        )
