"""Prompts as token ids, the same as in training, and tokens back as texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefopt.data.conversation import answers_end
from prefopt.data.encodings import Encodings, text_tokenizer
from prefopt.data.tokenize import tokens_of
from prefopt.generation.samples import PromptRow
from prefopt.safety.errors import UsageError


def prompt_ids(row: PromptRow, tokenizer: Any, encodings: Encodings | None = None) -> list[int]:
    """The ids of a prompt as training makes them: messages through the chat template, a text as it is.

    The row's `tools` and `chat_template_kwargs` go to the template.

    Raises:
        UsageError: for a prompt that is empty, or messages that the tokenizer has no template for.
    """
    if isinstance(row.prompt, list) and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"prompt {row.id} has messages, and the tokenizer has no chat template: pass one, or prompts of plain text"
        )
    ids = tokens_of({**row.columns, "prompt": row.prompt}, (), tokenizer, encodings=encodings).prompt
    if not ids:
        raise UsageError(f"prompt {row.id} is empty: the model has nothing to continue")
    return ids


def prompt_text(row: PromptRow, tokenizer: Any) -> str:
    """The text that `prompt_ids` encodes."""
    return tokens_of({**row.columns, "prompt": row.prompt}, (), tokenizer).prompt_text


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion: the tokenizer's, the model's, and what the chat template ends answers with."""
    tokenizer, processing = text_tokenizer(tokenizer), tokenizer
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    own = ends if isinstance(ends, list) else [ends]
    template_end = tokenizer.added_tokens_encoder.get(answers_end(processing))
    return sorted({int(token) for token in (*own, tokenizer.eos_token_id, template_end) if token is not None})


def pad_token(tokenizer: Any, ends: Sequence[int]) -> int:
    """The padding token; the first of the `end_tokens` if the tokenizer has none. Padding is always masked."""
    pad = text_tokenizer(tokenizer).pad_token_id
    return ends[0] if pad is None else int(pad)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A completion up to its first stop text."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class Reader:
    """Turns the tokens of a completion into its text.

    Args:
        tokenizer: the model's.
        ends: ids that end a completion, not part of the text.
        stop: texts that end a completion, not part of it.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], stop: Sequence[str]):
        self._tokenizer, self._ends, self._stop = text_tokenizer(tokenizer), frozenset(ends), tuple(stop)
        # Every token has at least a byte; a few more for what decodes differently at a beginning.
        self._window = max((len(text.encode("utf-8")) for text in stop), default=0) + 8

    def text(self, tokens: Sequence[int]) -> str:
        """The completion, up to its end token or its first stop text."""
        return before_stop(self._whole(tokens), self._stop)

    @property
    def stops(self) -> Callable[[list[int]], bool] | None:
        """Whether a row that grew by a token has a stop text now; None without stop texts."""
        return self._has_stop if self._stop else None

    def _has_stop(self, tokens: list[int]) -> bool:
        def within(text: str) -> bool:
            return any(stop in text for stop in self._stop)

        return within(self._whole(tokens[-self._window :])) and within(self._whole(tokens))

    def _whole(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in self._ends]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
