"""`prefopt sample`: completions of a model to prompts, in a file that judges and pair builders read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli.app import app, console, fail, say

if TYPE_CHECKING:
    from prefopt.generation.samples import Generator, PromptRow

_DRAWING, _SERVER, _OTHER = "How samples are drawn", "From a server", "From elsewhere"


@app.command()
def sample(
    prompts: Annotated[str, typer.Argument(help="A file (.jsonl ...), a save_to_disk folder or a Hub name.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write; one that was begun is continued.")],
    model: Annotated[
        str | None, typer.Option(help="A Hub name, a model's or an adapter's folder; the bundled one if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each prompt.", rich_help_panel=_DRAWING)] = 8,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token.", rich_help_panel=_DRAWING)
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="0 to 1.", rich_help_panel=_DRAWING)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 for all tokens.", rich_help_panel=_DRAWING)] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Where a completion is cut.", rich_help_panel=_DRAWING)
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends a completion; may be repeated.", rich_help_panel=_DRAWING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run.", rich_help_panel=_DRAWING)] = 0,
    round_number: Annotated[
        int, typer.Option("--round", min=0, help="Each round draws other samples.", rich_help_panel=_DRAWING)
    ] = 0,
    rows: Annotated[int | None, typer.Option(min=1, help="Samples in a batch.", rich_help_panel=_DRAWING)] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; auto is that of the files.", rich_help_panel=_DRAWING)
    ] = "auto",
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja template, or a file with one.", rich_help_panel=_DRAWING)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible server: http://host/v1.", rich_help_panel=_SERVER)
    ] = None,
    served_as: Annotated[
        str | None, typer.Option(help="The server's name for the model; --model if left out.", rich_help_panel=_SERVER)
    ] = None,
    send: Annotated[
        str,
        typer.Option(help="messages, or the tokens of training (vLLM, SGLang).", rich_help_panel=_SERVER),
    ] = "messages",
    key_variable: Annotated[
        str, typer.Option(help="The environment variable with the API key.", rich_help_panel=_SERVER)
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.", rich_help_panel=_SERVER)] = 16,
    extra: Annotated[
        str | None, typer.Option(help="Other fields of each request, as JSON.", rich_help_panel=_SERVER)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Samples of another program.", rich_help_panel=_OTHER)] = None,
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Draw with vLLM in this process.", rich_help_panel=_OTHER)
    ] = False,
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

    if sum((url is not None, file is not None, vllm)) > 1:
        fail("--url, --file and --vllm are different sources of samples: choose one")
    if not 0 < top_p <= 1:
        fail(f"--top-p is {top_p:g}; it must be above 0 and at most 1")
    if send not in ("messages", "tokens"):
        fail(f"--send is {send!r}; it must be messages or tokens")
    settings = SamplingSettings(samples, temperature, top_p, top_k, max_new_tokens, tuple(stop or ()), seed)
    is_main = PartialState().is_main_process
    rows_of_prompts = _read(prompts, split, say if is_main else lambda line: None)
    source: Generator
    if file is not None:
        source = _from_file(file, rows_of_prompts, settings, round_number)
    elif url is not None:
        source = _from_server(url, model, served_as, send, key_variable, concurrency, extra, chat_template)
    else:
        source = _from_model(model, dtype, rows, chat_template, vllm)
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


def _from_server(
    url: str, model: str | None, served_as: str | None, send: str, key_variable: str, concurrency: int,
    extra: str | None, chat_template: str | None,
) -> Generator:  # fmt: skip
    from prefopt.generation.endpoint import Endpoint
    from prefopt.generation.server import ServerGenerator
    from prefopt.models.load import load_tokenizer

    name = served_as or model
    if name is None:
        fail("--url needs --served-as, the server's name for the model, or --model if it is the same")
    fields = json.loads(extra) if extra else {}
    if not isinstance(fields, dict):
        fail(f'--extra must be a JSON object such as {{"min_p": 0.1}}, got {extra}')
    tokenizer = None if model is None else load_tokenizer(model, chat_template=chat_template)
    endpoint = Endpoint(url, key_variable=key_variable, concurrency=concurrency)
    return ServerGenerator(endpoint, name, tokenizer=tokenizer, send=send, extra=fields, say=say)  # type: ignore[arg-type]


def _from_model(model: str | None, dtype: str, rows: int | None, chat_template: str | None, vllm: bool) -> Generator:
    from prefopt.models.bundled import resolve_demo_model
    from prefopt.models.load import adapter_base, load_model, load_tokenizer

    name = str(resolve_demo_model(say=say)) if model is None else model
    tokenizer = load_tokenizer(name, chat_template=chat_template)
    if vllm:
        from prefopt.generation.vllm import VllmGenerator

        base = adapter_base(name)
        return VllmGenerator(base or name, tokenizer, adapter=None if base is None else Path(name), dtype=dtype)
    from accelerate import PartialState

    from prefopt.generation.transformers import TransformersGenerator

    network = load_model(name, {"dtype": dtype}).to(PartialState().device)
    return TransformersGenerator(network, tokenizer, rows_at_once=rows)
