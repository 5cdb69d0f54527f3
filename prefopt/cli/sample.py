"""`prefopt sample`: completions of a model to prompts, in a file that judges and pair builders read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli import generators as of
from prefopt.cli.app import app, console, fail, refuse_overwriting, say

if TYPE_CHECKING:
    from prefopt.generation.samples import Generator, PromptRow

_DRAWING = of.DRAWING


@app.command()
def sample(
    context: typer.Context,
    prompts: Annotated[str, typer.Argument(help="A file (.jsonl ...), a save_to_disk folder or a Hub name.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; one that was begun is continued.")],
    model: of.Model = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt.", rich_help_panel=_DRAWING)] = 8,
    temperature: of.Temperature = 1.0,
    top_p: of.TopP = 1.0,
    top_k: of.TopK = 0,
    max_new_tokens: of.MaxNewTokens = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends a completion; may be repeated.", rich_help_panel=_DRAWING),
    ] = None,
    seed: of.Seed = 0,
    round_number: Annotated[
        int, typer.Option("--round", min=0, help="Each round draws other samples.", rich_help_panel=_DRAWING)
    ] = 0,
    rows: of.Rows = None,
    dtype: of.Dtype = "auto",
    chat_template: of.ChatTemplate = None,
    url: of.Url = None,
    served_as: of.ServedAs = None,
    send: Annotated[
        str,
        typer.Option(help="messages, or the tokens of training (vLLM, SGLang).", rich_help_panel=of.SERVER),
    ] = "messages",
    key_variable: of.KeyVariable = "OPENAI_API_KEY",
    concurrency: of.Concurrency = 16,
    extra: of.Extra = None,
    file: Annotated[Path | None, typer.Option(help="Samples of another program.", rich_help_panel=of.OTHER)] = None,
    vllm: of.Vllm = False,
    split: Annotated[str, typer.Option(help="The split of PROMPTS.")] = "train",
) -> None:
    """Draw samples of a model for each prompt, and write them to a file.

    A file that was begun with the same settings is continued. Under `accelerate launch -m prefopt sample ...` the
    processes share the work.
    """
    from accelerate import PartialState
    from rich.progress import Progress

    from prefopt.generation.samples import SamplingSettings, read_samples
    from prefopt.generation.stage import count_samples, sample_to_file

    of.check_source(context, url, file, vllm)
    of.check_top_p(top_p)
    refuse_overwriting(out, prompts, file)
    if send not in ("messages", "tokens"):
        fail(f"--send is {send!r}; it must be messages or tokens")
    settings = SamplingSettings(samples, temperature, top_p, top_k, max_new_tokens, tuple(stop or ()), seed)
    is_main = PartialState().is_main_process
    if is_main and temperature == 0 and samples > 1 and file is None:
        say(f"Temperature 0 takes the likeliest token: the {samples} completions of a prompt will be the same")
    rows_of_prompts = _read(prompts, split, say if is_main else lambda line: None)
    source: Generator
    if file is not None:
        source = _from_file(file, rows_of_prompts, settings, round_number)
    elif url is not None:
        server = of.Server(url, served_as, key_variable, concurrency, extra)
        source = server.generator(model, chat_template, send)
    else:
        source = of.Local(model, dtype, rows, chat_template, vllm).generator()
    try:
        with Progress(console=console(), transient=True, disable=not is_main) as progress:
            task = progress.add_task("Sampling", total=len(rows_of_prompts))
            sample_to_file(
                source,
                rows_of_prompts,
                settings,
                out,
                round_number,
                lambda done: progress.update(task, completed=done),
            )
    finally:
        source.close()
    if is_main:
        say(f"{out}: {count_samples(read_samples(out))}")


def _read(prompts: str, split: str, tell: Any) -> list[PromptRow]:
    from prefopt.generation.stage import prompts_of, read_prompts

    if prompts.endswith(".jsonl") and Path(prompts).is_file():
        if split != "train":
            fail(f"--split {split} has no effect: {prompts} is one file, and all of it is read. Leave it out")
        rows, repeated = read_prompts(Path(prompts))
    else:
        from prefopt.data import load_preferences
        from prefopt.data.messages import without_nulls

        rows, repeated = prompts_of(map(without_nulls, load_preferences(prompts, split=split)), prompts)
    if repeated:
        tell(f"{repeated} rows of {prompts} repeat an earlier prompt; each prompt is sampled once")
    return rows


def _from_file(path: Path, prompts: list[PromptRow], settings: Any, round_number: int) -> Generator:
    from prefopt.generation.from_file import FileGenerator

    source = FileGenerator(path)
    if coverage := str(source.coverage(prompts, settings, round_number)):
        say(f"{path}: {coverage}")
    return source
