"""Samples from an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, a provider.

Each sample is a request of its own, with its own seed, so that a request that is repeated neither loses nor doubles
another sample. What a server answers is data: it is stored, never run or rendered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.generation.endpoint import Client, Endpoint, read_completion
from prefopt.generation.processes import from_main, on_main
from prefopt.generation.prompts import before_stop, prompt_ids
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, sample_seed, stored_settings
from prefopt.safety.errors import UsageError

logger = logging.getLogger(__name__)

Send = Literal["messages", "tokens"]


@dataclass(frozen=True)
class _Question:
    """A prompt as it is sent; `tokens` is its length in training, 0 if that is not known."""

    row: PromptRow
    path: str
    body: dict[str, Any]
    tokens: int


class ServerGenerator:
    """Draws samples from a server.

    Args:
        endpoint: where it is.
        model: the name that the server knows the model by.
        tokenizer: the model's; needed for `send="tokens"`. With it, the number of prompt tokens that the server
            reports is compared with training's.
        send: "messages" to `chat/completions`, where the server applies its chat template, and texts to
            `completions`; or the "tokens" of training to `completions`, which vLLM and SGLang take.
        extra: other fields of each request, as a server understands them.
        template_arguments: of the chat template, sent with messages; a row's own take precedence.
        say: called with a line for each failed attempt.
    """

    chunk_prompts = 1
    """Every sample is a request of its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        tokenizer: Any = None,
        send: Send = "messages",
        extra: Mapping[str, Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = logger.warning,
    ):
        if send == "tokens" and tokenizer is None:
            raise UsageError("to send tokens, the model's tokenizer is needed")
        self._client = Client(endpoint, say)
        self._model, self.name = model, model
        self._tokenizer, self._send, self._extra = tokenizer, send, dict(extra or {})
        self._template_arguments = dict(template_arguments or {})

    def sample(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int = 0
    ) -> Iterator[list[Sample]]:
        """The K samples of each prompt, in the order of the prompts. Of several processes, the main one asks."""
        yield from from_main(lambda: self._ask_all(prompts, settings, round_number))

    def close(self) -> None:
        self._client.close()

    # ---- which model draws ----------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> None:
        """Let a running vLLM draw with a LoRA adapter from now on; one that it has under this name is replaced.

        The server must have been started with `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, and must
        see the folder.

        Raises:
            UsageError: if the server refuses, with its words.
        """

        def load() -> None:
            self._unload(name)
            body = {"lora_name": name, "lora_path": str(folder.resolve())}
            self._client.post("load_lora_adapter", body, str)

        on_main(load)
        self._model = self.name = name

    def unload_adapter(self, name: str, model: str) -> None:
        """Take an adapter out of the server, and draw with `model` again."""
        on_main(lambda: self._unload(name))
        self._model = self.name = model

    def wait_for(self, name: str, listed: bool, seconds: float) -> None:
        """Draw with another model of the server from now on, as soon as it answers.

        Args:
            name: the server's name for the model.
            listed: wait until the server lists the name.
            seconds: the longest wait.

        Raises:
            ServerError: if it takes longer.
        """
        on_main(lambda: self._client.wait_for_model(name if listed else None, seconds))
        self._model = self.name = name

    def _unload(self, name: str) -> None:
        self._client.post("unload_lora_adapter", {"lora_name": name}, str, accepted=(200, 400, 404))

    # ---- requests -------------------------------------------------------------------------------------------------

    def _ask_all(
        self, prompts: Sequence[PromptRow], settings: SamplingSettings, round_number: int
    ) -> Iterator[list[Sample]]:
        # Prompts are rendered here, not in the threads: tokenizers are not safe in several.
        asked = (self._question(row) for row in prompts)
        jobs = ((question, index) for question in asked for index in range(settings.samples))

        def draw(job: tuple[_Question, int]) -> Sample:
            return self._draw(*job, settings, round_number)

        samples = self._client.in_order(jobs, draw)
        for _ in prompts:
            yield [next(samples) for _ in range(settings.samples)]

    def _draw(self, question: _Question, index: int, settings: SamplingSettings, round_number: int) -> Sample:
        row = question.row
        seed = sample_seed(settings.seed, round_number, row.id, index)
        body = {**question.body, **self._settings(settings, seed)}
        reply = self._client.post(question.path, body, read_completion)
        if question.tokens and reply.prompt_tokens not in (0, question.tokens):
            raise UsageError(
                f"prompt {row.id} has {question.tokens} tokens in training and {reply.prompt_tokens} at the server: "
                "it applies another chat template or tokenizer. Start it with those of the model that is trained, or "
                "send tokens instead of messages"
            )
        # Some servers leave a stop text at the end.
        text = before_stop(reply.text, settings.stop)
        return Sample(
            row.id, row.prompt, index, text, reply.tokens, reply.finished, round_number, seed,
            stored_settings(settings), self.name,
        )  # fmt: skip

    def _question(self, row: PromptRow) -> _Question:
        ids = prompt_ids(row, self._tokenizer) if self._tokenizer is not None else []
        if self._send == "tokens":
            return _Question(row, "completions", {"prompt": ids}, len(ids))
        if isinstance(row.prompt, str):
            return _Question(row, "completions", {"prompt": row.prompt}, len(ids))
        arguments = {**self._template_arguments, **(row.columns.get("chat_template_kwargs") or {})}
        options = {"tools": row.columns.get("tools"), "chat_template_kwargs": arguments}
        body = {"messages": row.prompt, **{name: value for name, value in options.items() if value}}
        return _Question(row, "chat/completions", body, len(ids))

    def _settings(self, settings: SamplingSettings, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model, "max_tokens": settings.max_new_tokens, "temperature": settings.temperature,
            "top_p": settings.top_p, "seed": seed,
        }  # fmt: skip
        if settings.stop:
            body["stop"] = list(settings.stop)
        if settings.top_k:
            body["top_k"] = settings.top_k  # not of OpenAI's; vLLM, SGLang and others take it
        return {**body, **self._extra}
