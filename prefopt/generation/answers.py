"""Greedy answers of a model in memory to a list of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from prefopt.generation.decode import Drawn, Request, Rows, decode
from prefopt.generation.prompts import Reader, end_tokens, pad_token, prompt_ids
from prefopt.generation.samples import PromptRow, SamplingSettings
from prefopt.safety.errors import UsageError
from prefopt.scoring.exact import undisturbed
from prefopt.scoring.model import positions_of

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """One greedy answer; `ended` is False if it reached the token limit."""

    text: str
    ended: bool

    def stripped(self) -> Answer:
        """The answer without white space around it."""
        return Answer(self.text.strip(), self.ended)


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int = 48, batch_size: int = 24
) -> list[Answer]:
    """Answer each prompt greedily; returns the answers in order.

    Args:
        model: in memory; its mode is left as it is.
        tokenizer: the model's, or a processor.
        prompts: messages, or a text: what a user says, or the text to continue if the tokenizer has no chat template.
        max_new_tokens: maximum length of an answer.
        batch_size: prompts at once.

    Raises:
        UsageError: for messages without a chat template.
    """
    chats = bool(getattr(tokenizer, "chat_template", None))
    if not chats and not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError("the tokenizer has no chat template, so prompts must be texts, not messages")
    rows = [PromptRow(_asked(prompt) if chats else str(prompt)) for prompt in prompts]
    ids = [prompt_ids(row, tokenizer) for row in rows]
    return [answer.stripped() for answer in continued(model, tokenizer, ids, max_new_tokens, batch_size)]


def continued(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int = 64
) -> list[Answer]:
    """Continue token ids greedily; returns the continuations in order.

    Neighbours in length share a batch; where one ends, the next takes its place.

    Args:
        model: in memory, whole on this process's device; its mode is left as it is.
        tokenizer: the model's, or a processor.
        prompts: token ids, none of them empty.
        max_new_tokens: maximum length of a continuation; a prompt that leaves fewer of the model's positions has a
            shorter one.
        batch_size: prompts at once.

    Raises:
        UsageError: for a prompt that leaves no position.
    """
    reader = Reader(tokenizer, end_tokens(model, tokenizer), ())
    settings = SamplingSettings(samples=1, temperature=0.0, max_new_tokens=max_new_tokens)
    drawn = draw_each(model, tokenizer, prompts, settings, [0] * len(prompts), batch_size)
    return [Answer(reader.text(one.tokens), one.finished) for one in drawn]


def draw_each(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    seeds: Sequence[int],
    batch_size: int = 64,
) -> list[Drawn]:
    """One continuation of each prompt, in order, with the prompt's own seed; else as `continued`.

    Raises:
        UsageError: for a prompt that leaves no position.
    """
    ends = end_tokens(model, tokenizer)
    pad = pad_token(tokenizer, ends)
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    drawn: dict[int, Drawn] = {}
    with undisturbed(model):
        for limit, numbers in groupby(order, lambda number: _room(model, prompts[number], settings.max_new_tokens)):
            mine = list(numbers)
            own = replace(settings, max_new_tokens=limit)
            rows = Rows([seeds[number] for number in mine], own, ends, None, model.device)
            requests = [Request(prompts[number], [row]) for row, number in enumerate(mine)]
            decode(model, requests, rows, pad, batch_size)
            drawn |= zip(mine, rows.drawn(), strict=True)
    return [drawn[number] for number in range(len(prompts))]


def _room(model: Any, prompt: Sequence[int], wanted: int) -> int:
    """How many tokens may follow a prompt."""
    positions = positions_of(model)
    if not positions or len(prompt) + wanted <= positions:
        return wanted
    if len(prompt) >= positions:
        raise UsageError(
            f"a prompt has {len(prompt)} tokens, and the model {positions} positions: none is left for an answer. "
            "Shorten the prompt or leave it out"
        )
    return positions - len(prompt)


def _asked(prompt: Prompt) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]
