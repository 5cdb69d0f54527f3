"""The generator of a round: the policy as it is now, in memory, behind a server or in vLLM; or a file of samples."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from prefopt.generation.from_file import FileGenerator
from prefopt.generation.processes import on_main
from prefopt.generation.samples import Generator
from prefopt.generation.transformers import TransformersGenerator
from prefopt.models.load import adapter_base
from prefopt.online.options import options_of
from prefopt.recipe import Recipe
from prefopt.recipe.build import load_to_sample
from prefopt.recipe.ready import Ready
from prefopt.safety.errors import UsageError

_SERVER_START_S = 1800.0
"""How long a server may take to load a model."""


class Generators(Protocol):
    """Makes the generators of a run."""

    def open(self, model: str) -> Generator:
        """The generator of a model, a folder or a Hub name; the one opened last stays until `close`."""
        ...

    def of_round(self, model: str, number: int) -> Generator:
        """What gives the samples of a round to train on: the model's generator, or a file."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


def generators_of(recipe: Recipe, ready: Ready) -> Generators:
    """What `--generator` names.

    Raises:
        UsageError: if something that it needs is not installed.
    """
    script = options_of(recipe)
    if script.generator == "server":
        return AtServer(recipe, ready)
    if script.generator == "vllm":
        return InVllm(recipe, ready)
    memory = InMemory(recipe, ready)
    return memory if script.samples_file is None else FromFiles(script.samples_file, memory, recipe.console.print)


def check_generator(recipe: Recipe, ready: Ready, heldout: bool) -> None:
    """Refuse a server that the policy of a later round cannot get to.

    Raises:
        UsageError: saying what to do.
    """
    script = options_of(recipe)
    adapters = recipe.model.use_peft or ready.adapter_of is not None
    changes = script.rounds > 1 or heldout
    if script.generator == "server" and changes and not adapters and script.server_restart is None:
        raise UsageError(
            "each round trains a whole model, and a running server cannot change its model. Train an adapter "
            "(--use_peft), which is loaded into vLLM after each round; or name a command that starts the server again "
            'with another model: --server_restart "bash restart_server.sh {model} {name}"'
        )


class _OneAtATime(ABC):
    """Generators that hold a model in this process, one at a time."""

    def __init__(self) -> None:
        self._opened: tuple[str, Generator] | None = None

    @abstractmethod
    def _load(self, model: str) -> Generator:
        """The generator of a model, which is loaded."""

    def open(self, model: str) -> Generator:
        if self._opened is None or self._opened[0] != model:
            self.close()
            self._opened = (model, self._load(model))
        return self._opened[1]

    def of_round(self, model: str, number: int) -> Generator:
        return self.open(model)

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


class InMemory(_OneAtATime):
    """Generators of models in memory.

    Args:
        recipe: the options.
        ready: the initial model, for the tokenizer and how to load models.
    """

    def __init__(self, recipe: Recipe, ready: Ready):
        super().__init__()
        self._recipe, self._ready = recipe, ready

    def _load(self, model: str) -> Generator:
        return TransformersGenerator(load_to_sample(model, self._recipe, self._ready), self._ready.tokenizer)


class FromFiles:
    """Samples of another program to train on; held-out prompts are answered by the model in memory.

    Args:
        path: of the file of all rounds, or with `{round}` where a round's number is to stand.
        memory: the models.
        say: prints a line.
    """

    def __init__(self, path: str, memory: InMemory, say: Callable[..., None]):
        self._path, self._memory, self._say = path, memory, say

    def open(self, model: str) -> Generator:
        return self._memory.open(model)

    def of_round(self, model: str, number: int) -> Generator:
        path = Path(self._path.replace("{round}", str(number)))
        if not path.exists():
            raise UsageError(
                f"there are no samples for round {number}: {path} does not exist. Draw them from {model}, and start "
                "the same command again"
            )
        return FileGenerator(path)

    def close(self) -> None:
        self._memory.close()


class AtServer:
    """Generators of a server: each round's adapter is loaded into it, or it is started again with the round's model.

    Args:
        recipe: the options.
        ready: the initial model, for the tokenizer.
    """

    def __init__(self, recipe: Recipe, ready: Ready):
        from prefopt.generation.endpoint import Endpoint
        from prefopt.generation.server import ServerGenerator

        script = self._script = options_of(recipe)
        self._initial, self._say = ready.model, recipe.console.print
        self._base = script.served_as or ready.adapter_of or ready.model
        endpoint = Endpoint(
            str(script.server_url),
            key_variable=script.server_key_variable,
            concurrency=script.server_concurrency,
        )
        self._generator = ServerGenerator(
            endpoint,
            self._base,
            tokenizer=ready.tokenizer,
            send=cast("Literal['messages', 'tokens']", script.server_send),
            extra=_mapping(script.generator_options),
            template_arguments=_mapping(recipe.training.chat_template_kwargs),
            say=lambda line: recipe.console.print(line, soft_wrap=True, markup=False),
        )
        self._serves: str | None = None if script.server_restart else self._base

    def open(self, model: str) -> Generator:
        whole = self._script.server_restart is not None or adapter_base(model) is None
        name = self._base if model == self._initial and whole else name_of(model)
        if name != self._serves:
            self._serve(model, name)
            self._serves = name
        return self._generator

    def of_round(self, model: str, number: int) -> Generator:
        return self.open(model)

    def close(self) -> None:
        """The server keeps what it has: its memory is its own."""

    def _serve(self, model: str, name: str) -> None:
        if self._script.server_restart is not None:
            self._restart(self._script.server_restart, model, name)
            return
        if self._serves not in (None, self._base):
            self._generator.unload_adapter(str(self._serves), self._base)
        if name != self._base:
            self._say(f"Loading {model} into the server as {name}", soft_wrap=True, markup=False)
            self._generator.load_adapter(name, Path(model))

    def _restart(self, command: str, model: str, name: str) -> None:
        folder = str(Path(model).resolve()) if Path(model).is_dir() else model
        words = [word.replace("{model}", folder).replace("{name}", name) for word in shlex.split(command)]

        def start() -> None:
            self._say(f"Starting the server with {model}: {shlex.join(words)}", soft_wrap=True, markup=False)
            try:
                done = subprocess.run(words, stdin=subprocess.DEVNULL, check=False)
            except OSError as error:
                raise UsageError(f"--server_restart {command!r} cannot be run: {error}") from None
            if done.returncode:
                raise UsageError(f"--server_restart ended with status {done.returncode}: {shlex.join(words)}")

        on_main(start)
        by_name = "{name}" in command
        self._generator.wait_for(name if by_name else self._base, listed=by_name, seconds=_SERVER_START_S)
        self._generator.name = name


class InVllm(_OneAtATime):
    """Generators of models in vLLM in this process.

    Args:
        recipe: the options.
        ready: the initial model, for the tokenizer.
    """

    def __init__(self, recipe: Recipe, ready: Ready):
        super().__init__()
        self._options = _mapping(options_of(recipe).generator_options)
        self._initial, self._tokenizer = ready.model, ready.tokenizer

    def _load(self, model: str) -> Generator:
        from prefopt.generation.vllm import VllmGenerator

        base = adapter_base(model)
        return VllmGenerator(
            base or model,
            self._tokenizer,
            adapter=None if base is None else Path(model),
            name=model if model == self._initial else name_of(model),
            **self._options,
        )


def name_of(model: str) -> str:
    """A name for the model in a folder that changes with its weights, such as round-1-3fa9c2d1."""
    folder = Path(model)

    def digest() -> str:
        whole = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()[:8]

    return f"{folder.parent.name if folder.name == 'model' else folder.name}-{on_main(digest)}"


def _mapping(options: dict[str, Any] | str | None) -> dict[str, Any]:
    return dict(options) if isinstance(options, dict) else {}
