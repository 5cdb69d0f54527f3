"""Text to token ids, one row at a time: the prompt's tokens and each completion's.

The ids equal TRL's if the tokenized prompt begins the tokenized prompt + completion. Otherwise the prompt stays
whole, as at inference (TRL cuts its end off). `round_trip` checks the result. It
imports transformers and datasets, never trl.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from prefopt.data.columns import column_names
from prefopt.data.conversation import Processing, Row, answers_end, for_template, template_arguments
from prefopt.data.encodings import Encodings
from prefopt.data.errors import DataError
from prefopt.data.groups import SIDES, is_group, spread
from prefopt.data.templates import time_limit

# A completion that no template treats specially and no generation prompt contains: it shows where completions begin.
_PLACEHOLDER = "\u241fcompletion\u241f"

T = TypeVar("T")

_OPENED = re.compile(r"<([^<>/|\s]+)>\s*$")
"""An opening mark, such as `<think>`, at the end of a generation prompt."""


@dataclass(frozen=True)
class Tokens:
    """A row's ids and the texts that they were made from.

    Attributes:
        prompt: the context's ids.
        completions: the scored ids of each side.
        repaired: of each side, whether the prompt's ids did not begin the whole's, so that it was tokenized alone.
        prompt_text: the prompt with its generation prompt, from the template or from the row.
        texts: of each side, prompt and completion as one text.
        alone: of each side, the text that was tokenized alone, if it was.
        clashes: of each side, whether it does not fit the end of the prompt alone: for example a thought where the
            generation prompt has an empty one, or no thought where that has opened one.
        encodings: the ids of each text that was tokenized.
        messages: of a conversation, the messages of the prompt and of each side in the form for the template.
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    repaired: tuple[bool, ...]
    prompt_text: str
    texts: tuple[str, ...]
    alone: tuple[str, ...]
    clashes: tuple[bool, ...]
    encodings: Mapping[str, list[int]] = field(default_factory=dict)
    messages: tuple[list[Any], ...] = ()


def tokenize_row(example: Row, processing_class: Processing, eos_token: str | None = None) -> dict[str, Any]:
    """`prompt_ids` with `chosen_ids` and `rejected_ids`, with `completion_ids` or with `completions_ids`, and the flag
    `boundary`.

    `boundary` is True where the tokenized prompt was not the beginning of the tokenized whole for at least one
    completion, so that the completion was tokenized separately after the whole prompt. `eos_token` ends plain
    completions that do not end with it (conversations end as their template says); default: the tokenizer's.
    """
    names = sides(example)
    tokens = tokens_of(*spread(example, names), processing_class, eos_token)
    return {**id_columns(tokens, names), "boundary": any(tokens.repaired)}


def id_columns(tokens: Tokens, names: Sequence[str]) -> dict[str, Any]:
    """The id columns of a row: `prompt_ids`, and `completions_ids`, a list of lists, or one for each of `names`."""
    completions = [list(tokens.completions)] if is_group(names) else tokens.completions
    return {"prompt_ids": tokens.prompt, **{f"{n}_ids": ids for n, ids in zip(names, completions, strict=True)}}


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Processing,
    num_proc: int | None = None,
    desc: str | None = None,
    eos_token: str | None = None,
) -> Dataset | IterableDataset:
    """Adds the id columns to every row of a normalised dataset; one that has them is returned unchanged."""
    if "prompt_ids" in column_names(dataset):
        return dataset
    arguments = {"processing_class": processing_class, "eos_token": eos_token}
    if isinstance(dataset, Dataset):
        return dataset.map(_ids_of, fn_kwargs=arguments, num_proc=num_proc, desc=desc)
    return dataset.map(_ids_of, fn_kwargs=arguments)


def _ids_of(example: Row, processing_class: Processing, eos_token: str | None) -> dict[str, Any]:
    row = tokenize_row(example, processing_class, eos_token)
    del row["boundary"]
    return row


def sides(example: Row) -> tuple[str, ...]:
    """The columns that hold the row's completions."""
    if "chosen" in example:
        return ("chosen", "rejected")
    return ("completion",) if "completion" in example else SIDES


def tokens_of(
    example: Row,
    names: Sequence[str],
    processing_class: Processing,
    eos_token: str | None = None,
    encodings: Encodings | None = None,
) -> Tokens:
    """The ids of `tokenize_row` with their texts; `encodings` answers for the tokenizer, if many rows share it."""
    encodings = Encodings(processing_class) if encodings is None else encodings
    if not isinstance(example["prompt"], list):
        return _tokens_of_text(_encode_text(example, names, encodings, eos_token), encodings)
    with time_limit("the chat template"):
        return _tokenize_messages(render(example, names, encodings), encodings)


def tokens_ahead(rows: Sequence[tuple[Row, Sequence[str]]], encodings: Encodings) -> list[Tokens | None]:
    """The tokens of many rows, with few calls of the tokenizer; `encodings` then knows their texts and ids.

    Args:
        rows: each with the names of its completions.
        encodings: answers for the tokenizer.

    None for a row that the template or the tokenizer refuses: `tokens_of` says why.

    Raises:
        DataError: if the tokenizer has no token that ends texts, or a template does not end.
    """

    def attempt(step: Callable[[int], T], number: int) -> T | None:
        try:
            return step(number)
        except DataError:
            raise
        except Exception:
            return None

    texts = [attempt(lambda number: _texts(*rows[number], encodings), number) for number in range(len(rows))]
    with contextlib.suppress(Exception):  # of a text that the tokenizer refuses, in one row
        encodings.encode_plain_ahead([of_row for of_row in texts if isinstance(of_row, list)])
        talks = [of_row for of_row in texts if isinstance(of_row, Rendered)]
        encodings.encode_ahead(text for talk in talks for text in (talk.prompt_text, *talk.texts))

    plain = {
        number: attempt(lambda number: _encode_text(*rows[number], encodings, None), number)
        for number, of_row in enumerate(texts)
        if isinstance(of_row, list)
    }
    with contextlib.suppress(Exception):
        encodings.encode_alone_ahead(own for text in plain.values() if text is not None for own in text.alone if own)

    def tokens(number: int) -> Tokens | None:
        talk, text = texts[number], plain.get(number)
        if isinstance(talk, Rendered):
            with time_limit("the chat template"):
                return _tokenize_messages(talk, encodings)
        return None if text is None else _tokens_of_text(text, encodings)

    made = [attempt(tokens, number) for number in range(len(rows))]
    encodings.decode_ahead(ids for row in made if row is not None for ids in (row.prompt, *row.completions))
    return made


def _texts(row: Row, names: Sequence[str], encodings: Encodings) -> Rendered | list[str]:
    if not isinstance(row["prompt"], list):
        return plain_texts(row, names, encodings)
    with time_limit("the chat template"):
        return render(row, names, encodings)


def plain_texts(example: Row, names: Sequence[str], encodings: Encodings, eos_token: str | None = None) -> list[str]:
    """What is encoded of a row of plain text: the prompt, then the prompt with each completion and its end.

    Raises:
        DataError: if the tokenizer has no token that ends texts.
    """
    eos_token = eos_token or encodings.tokenizer.eos_token
    if not eos_token:
        raise DataError(
            "The tokenizer has no end-of-sequence token, and plain completions must end with one. "
            "Set tokenizer.eos_token, or pass eos_token."
        )
    prompt, ends = example["prompt"], _ends(encodings, eos_token)
    # Text rendered before ends as templates end it: with white space after the token, or with another token.
    ended = [example[name] if example[name].rstrip().endswith(ends) else example[name] + eos_token for name in names]
    return [prompt, *(prompt + text for text in ended)]


@dataclass(frozen=True)
class _PlainText:
    """A row of plain text, encoded as a whole.

    Attributes:
        prompt: its text.
        wholes: of each side, prompt and completion as one text.
        prompt_ids: of the prompt alone.
        whole_ids: of each side's whole.
    """

    prompt: str
    wholes: tuple[str, ...]
    prompt_ids: list[int]
    whole_ids: tuple[list[int], ...]

    @property
    def alone(self) -> tuple[str, ...]:
        """Of each side, the completion's text if it must be encoded alone: the prompt's ids do not begin the whole."""
        count = len(self.prompt_ids)
        return tuple(
            "" if ids[:count] == self.prompt_ids else text[len(self.prompt) :]
            for text, ids in zip(self.wholes, self.whole_ids, strict=True)
        )


def _encode_text(example: Row, names: Sequence[str], encodings: Encodings, eos_token: str | None) -> _PlainText:
    tokenizer = encodings.tokenizer
    prompt, *wholes = plain_texts(example, names, encodings, eos_token)
    eos_token = str(eos_token or tokenizer.eos_token)
    prompt_ids = encodings.plain(prompt)
    # Some tokenizers end every text with the end token; after a prompt without it, it is not part of the context.
    eos_id = tokenizer.convert_tokens_to_ids(eos_token)
    if prompt_ids and prompt_ids[-1] == eos_id and not prompt.endswith(eos_token):
        prompt_ids = prompt_ids[:-1]
    whole_ids = []
    for text in wholes:
        whole = encodings.plain(text)
        if whole[-2:] == [eos_id, eos_id] and not text[len(prompt) :].rstrip().endswith(2 * eos_token):
            whole.pop()  # the text's own, and one of a tokenizer that adds it
        whole_ids.append(whole)
    return _PlainText(prompt, tuple(wholes), prompt_ids, tuple(whole_ids))


def _tokens_of_text(text: _PlainText, encodings: Encodings) -> Tokens:
    alone, count = text.alone, len(text.prompt_ids)
    completions = tuple(
        encodings.alone(own) if own else whole[count:] for own, whole in zip(alone, text.whole_ids, strict=True)
    )
    repaired = tuple(whole[:count] != text.prompt_ids for whole in text.whole_ids)
    clashes = (False,) * len(completions)
    return Tokens(text.prompt_ids, completions, repaired, text.prompt, text.wholes, alone, clashes)


def _ends(encodings: Encodings, eos_token: str) -> tuple[str, ...]:
    """The tokens that end a completion: the given one, and the one that the chat template ends an answer with."""
    end = answers_end(encodings.processing_class)
    special = encodings.tokenizer.added_tokens_encoder.get(end)
    return (eos_token,) if special is None or end == eos_token else (eos_token, end)


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template prints it.

    Attributes:
        prompt: its messages, in the form for the template.
        completions: of each side, its messages.
        arguments: of the template.
        prompt_text: the prompt with its generation prompt.
        texts: of each side, prompt and completion as one text.
    """

    prompt: list[Any]
    completions: tuple[list[Any], ...]
    arguments: dict[str, Any]
    prompt_text: str
    texts: tuple[str, ...]


def render(example: Row, names: Sequence[str], encodings: Encodings) -> Rendered:
    """The texts of a conversation. Call it within `time_limit`: templates are programs."""
    processing_class, arguments = encodings.processing_class, template_arguments(example)
    prompt = for_template(example["prompt"], processing_class)
    prompt_text = _render(prompt, processing_class, add_generation_prompt=True, **arguments)
    completions = tuple(for_template(example[name], processing_class) for name in names)
    texts = tuple(_render(prompt + completion, processing_class, **arguments) for completion in completions)
    return Rendered(prompt, completions, arguments, prompt_text, texts)


def _tokenize_messages(rendered: Rendered, encodings: Encodings) -> Tokens:
    prompt, arguments, prompt_text = rendered.prompt, rendered.arguments, rendered.prompt_text
    prompt_ids = _ids(prompt, prompt_text, encodings, add_generation_prompt=True, **arguments)
    by_text = {prompt_text: prompt_ids}
    completions, repaired, alone, clashes = [], [], [], []
    for completion, text in zip(rendered.completions, rendered.texts, strict=True):
        whole = by_text[text] = _ids(prompt + completion, text, encodings, **arguments)
        repaired.append(whole[: len(prompt_ids)] != prompt_ids)
        if repaired[-1]:
            start, clash = _start(prompt, completion, prompt_text, text, encodings.processing_class, arguments)
            completions.append(encodings.alone(text[start:]))
            by_text[text[start:]] = completions[-1]
        else:
            start, clash = len(text), False
            completions.append(whole[len(prompt_ids) :])
        alone.append(text[start:])
        clashes.append(clash)
    sides = tuple(completions), tuple(repaired), prompt_text, rendered.texts, tuple(alone)
    return Tokens(prompt_ids, *sides, tuple(clashes), by_text, (prompt, *rendered.completions))


def _ids(messages: list[Any], text: str, encodings: Encodings, **arguments: Any) -> list[int]:
    """The ids of a rendered conversation; a processor renders and tokenizes it in its own way."""
    if encodings.renders:
        return encodings.alone(text)
    result = encodings.processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
    ids = result["input_ids"]
    return list(ids[0] if isinstance(encodings.processing_class, ProcessorMixin) else ids)


def _start(
    prompt: list[Any],
    completion: list[Any],
    opening: str,
    whole: str,
    processing_class: Processing,
    arguments: dict[str, Any],
) -> tuple[int, bool]:
    """Where the completion begins in the rendered conversation, and whether it clashes with the prompt's end.

    It begins after the common beginning with the prompt alone.

    A completion may itself begin like the end of the prompt (`<think>`), which the common beginning would include;
    rendering a placeholder in its place shows where completions begin. If the template prints the prompt itself
    differently once an answer follows (a system message only with the last message, a line break after a tool's
    answer), the common beginning ends too early; the completion then begins where the end of the prompt alone
    ends in the whole. A generation prompt that opens a thought, and a completion that does not close it, clash.
    """
    start = shared(opening, whole)
    if not completion:
        return start, False
    stand_in: Any = {"role": completion[0]["role"], "content": _PLACEHOLDER}
    other = _render([*prompt, *for_template([stand_in], processing_class)], processing_class, **arguments)
    plain = shared(opening, other)
    clash, start = start < plain, min(start, plain)
    lead = other.partition(_PLACEHOLDER)[0]
    last, rest = _last_text(prompt), opening[start:]
    asked = lead.rfind(last) + len(last) if last and last in lead else 0
    if whole.startswith(lead) and start < asked:
        ends = range(len(lead), asked - 1, -1)
        return max(ends, key=lambda end: shared(opening[::-1], lead[:end][::-1])), False
    if whole.startswith(lead) and rest and rest in lead[start:]:
        return lead.rfind(rest) + len(rest), False
    opened = _OPENED.search(rest)
    return start, clash or (opened is not None and f"</{opened[1]}>" not in whole[start:])


def _last_text(messages: list[Any]) -> str:
    content = messages[-1].get("content") if messages else None
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], dict) else None
    return content.strip() if isinstance(content, str) else ""


def _render(messages: list[Any], processing_class: Processing, **arguments: Any) -> str:
    return str(processing_class.apply_chat_template(messages, tokenize=False, **arguments))


def shared(left: str, right: str) -> int:
    """Length of the longest common beginning."""
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length
