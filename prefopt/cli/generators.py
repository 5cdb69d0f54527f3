"""The options that say where completions come from, and the generators that they name; no command of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt.cli.app import fail, say

if TYPE_CHECKING:
    from prefopt.generation.samples import Generator

DRAWING, SERVER, OTHER = "How samples are drawn", "From a server", "From elsewhere"

Model = Annotated[
    str | None, typer.Option(help="A Hub name, a model's or an adapter's folder; the bundled one if left out.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.", rich_help_panel=DRAWING)]
TopP = Annotated[float, typer.Option(help="0 to 1.", rich_help_panel=DRAWING)]
TopK = Annotated[int, typer.Option(min=0, help="0 for all tokens.", rich_help_panel=DRAWING)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Where a completion is cut.", rich_help_panel=DRAWING)]
Seed = Annotated[int, typer.Option(help="Of the run.", rich_help_panel=DRAWING)]
Rows = Annotated[int | None, typer.Option(min=1, help="Samples in a batch.", rich_help_panel=DRAWING)]


def read_dtype(name: str) -> str:
    """The name of a dtype; an unknown one ends the command."""
    import torch

    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        fail(f"--dtype {name}: there is no such type; use auto, float32, bfloat16 or float16")
    return name


Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, ...; auto is that of the files.", callback=read_dtype, rich_help_panel=DRAWING
    ),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="A Jinja template, or a file with one.", rich_help_panel=DRAWING)
]
Url = Annotated[
    str | None, typer.Option(help="Of an OpenAI-compatible server: http://host/v1.", rich_help_panel=SERVER)
]
ServedAs = Annotated[
    str | None, typer.Option(help="The server's name for the model; --model if left out.", rich_help_panel=SERVER)
]
KeyVariable = Annotated[str, typer.Option(help="The environment variable with the API key.", rich_help_panel=SERVER)]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at once.", rich_help_panel=SERVER)]
Extra = Annotated[str | None, typer.Option(help="Other fields of each request, as JSON.", rich_help_panel=SERVER)]
Vllm = Annotated[bool, typer.Option("--vllm", help="Draw with vLLM in this process.", rich_help_panel=OTHER)]


_OF_SERVER = ("served_as", "send", "key_variable", "concurrency", "extra")
_OF_MEMORY = ("dtype", "rows")
_OF_DRAWING = ("model", "chat_template", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "seed")


def check_source(context: typer.Context, url: str | None, file: Path | None, vllm: bool) -> None:
    """End the command if more than one source of samples is named, or an option that the source does not read."""
    if sum((url is not None, file is not None, vllm)) > 1:
        fail("--url, --file and --vllm are different sources of samples: choose one")
    idle = dict.fromkeys(_OF_MEMORY if url is not None else (), "--url names a server")
    idle |= dict.fromkeys(_OF_SERVER if url is None else (), "there is no --url")
    if vllm:
        idle["rows"] = "vLLM chooses the batch"
    if file is not None:
        idle |= dict.fromkeys((*_OF_MEMORY, *_OF_DRAWING), "the samples in --file are drawn already")
    for name, reason in idle.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            fail(f"--{name.replace('_', '-')} has no effect, since {reason}: leave it out")


def check_top_p(top_p: float) -> None:
    """End the command if there is no such share of probability."""
    if not 0 < top_p <= 1:
        fail(f"--top-p is {top_p:g}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Server:
    """The options about a server, as they were named."""

    url: str
    served_as: str | None
    key_variable: str
    concurrency: int
    extra: str | None

    def generator(self, model: str | None, chat_template: str | None, send: str = "messages") -> Generator:
        """The generator; `model` and `chat_template` are for its tokenizer, if it is on this machine."""
        from prefopt.generation.endpoint import Endpoint
        from prefopt.generation.server import ServerGenerator
        from prefopt.models.load import load_tokenizer

        name = self.served_as or model
        if name is None:
            fail("--url needs --served-as, the server's name for the model, or --model if it is the same")
        try:
            fields = json.loads(self.extra) if self.extra else {}
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            fail(f'--extra must be a JSON object such as {{"min_p": 0.1}}, got {self.extra}')
        tokenizer = None if model is None else load_tokenizer(model, chat_template=chat_template)
        endpoint = Endpoint(self.url, key_variable=self.key_variable, concurrency=self.concurrency)
        return ServerGenerator(endpoint, name, tokenizer=tokenizer, send=send, extra=fields, say=say)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Local:
    """The options about a model on this machine, as they were named."""

    model: str | None
    dtype: str
    rows: int | None
    chat_template: str | None
    vllm: bool

    @cached_property
    def name(self) -> str:
        """The folder or the Hub name; the bundled model's if none was named."""
        from prefopt.models.bundled import resolve_demo_model

        return str(resolve_demo_model(say=say)) if self.model is None else self.model

    @cached_property
    def tokenizer(self) -> Any:
        from prefopt.models.load import load_tokenizer

        return load_tokenizer(self.name, chat_template=self.chat_template)

    def generator(self) -> Generator:
        """The generator, its model loaded."""
        from prefopt.models.load import adapter_base, load_model

        tokenizer = self.tokenizer
        if self.vllm:
            from prefopt.generation.vllm import VllmGenerator

            base = adapter_base(self.name)
            adapter = None if base is None else Path(self.name)
            return VllmGenerator(base or self.name, tokenizer, adapter=adapter, dtype=self.dtype)
        from accelerate import PartialState

        from prefopt.generation.transformers import TransformersGenerator

        network = load_model(self.name, {"dtype": self.dtype}).to(PartialState().device)
        return TransformersGenerator(network, tokenizer, rows_at_once=self.rows)
