"""Text to token ids, one row at a time: the prompt's tokens and each completion's.

The ids equal TRL's if the tokenized prompt begins the tokenized prompt + completion. Otherwise the prompt stays
whole, as at inference (TRL cuts its end off). `round_trip` checks the result. It
imports transformers and datasets, never trl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from prefopt.data.columns import column_names
from prefopt.data.conversation import Processing, Row, answers_end, for_template, template_arguments
from prefopt.data.errors import DataError
from prefopt.data.templates import time_limit

# A completion that no template treats specially and no generation prompt contains: it shows where completions begin.
_PLACEHOLDER = "\u241fcompletion\u241f"

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
    """

    prompt: list[int]
    completions: tuple[list[int], ...]
    repaired: tuple[bool, ...]
    prompt_text: str
    texts: tuple[str, ...]
    alone: tuple[str, ...]
    clashes: tuple[bool, ...]
    encodings: Mapping[str, list[int]] = field(default_factory=dict)


def tokenize_row(example: Row, processing_class: Processing, eos_token: str | None = None) -> dict[str, Any]:
    """`prompt_ids` with `chosen_ids` and `rejected_ids`, or with `completion_ids`, and the flag `boundary`.

    `boundary` is True where the tokenized prompt was not the beginning of the tokenized whole for at least one
    completion, so that the completion was tokenized separately after the whole prompt. `eos_token` ends plain
    completions that do not end with it (conversations end as their template says); default: the tokenizer's.
    """
    names = sides(example)
    tokens = tokens_of(example, names, processing_class, eos_token)
    ids = {f"{name}_ids": ids for name, ids in zip(names, tokens.completions, strict=True)}
    return {"prompt_ids": tokens.prompt, **ids, "boundary": any(tokens.repaired)}


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
    return ("chosen", "rejected") if "chosen" in example else ("completion",)


def tokens_of(
    example: Row, names: Sequence[str], processing_class: Processing, eos_token: str | None = None
) -> Tokens:
    """The ids of `tokenize_row` with their texts."""
    if not isinstance(example["prompt"], list):
        return _tokenize_text(example, names, processing_class, eos_token)
    with time_limit("the chat template"):
        return _tokenize_messages(example, names, processing_class)


def text_tokenizer(processing_class: Processing) -> PreTrainedTokenizerBase:
    """The tokenizer itself, which a multimodal processor contains."""
    if isinstance(processing_class, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
        return tokenizer
    return processing_class


def _tokenize_text(example: Row, names: Sequence[str], processing_class: Processing, eos_token: str | None) -> Tokens:
    prompt = example["prompt"]
    tokenizer = text_tokenizer(processing_class)
    eos_token = eos_token or tokenizer.eos_token
    if not eos_token:
        raise DataError(
            "The tokenizer has no end-of-sequence token, and plain completions must end with one. "
            "Set tokenizer.eos_token, or pass eos_token."
        )
    prompt_ids = encode_text(prompt, processing_class)
    # Some tokenizers end every text with the end token; after a prompt without it, it is not part of the context.
    eos_id = tokenizer.convert_tokens_to_ids(eos_token)
    if prompt_ids and prompt_ids[-1] == eos_id and not prompt.endswith(eos_token):
        prompt_ids = prompt_ids[:-1]
    ends = _ends(processing_class, tokenizer, eos_token)
    completions, repaired, texts = [], [], []
    for name in names:
        # Text rendered before ends as templates end it: with white space after the token, or with another token.
        text = example[name] if example[name].rstrip().endswith(ends) else example[name] + eos_token
        whole = encode_text(prompt + text, processing_class)
        if whole[-2:] == [eos_id, eos_id] and not text.rstrip().endswith(2 * eos_token):
            whole.pop()  # the text's own, and one of a tokenizer that adds it
        repaired.append(whole[: len(prompt_ids)] != prompt_ids)
        completions.append(encode_alone(text, tokenizer) if repaired[-1] else whole[len(prompt_ids) :])
        texts.append(prompt + text)
    alone = ["" if not again else text[len(prompt) :] for again, text in zip(repaired, texts, strict=True)]
    sides = tuple(completions), tuple(repaired), prompt, tuple(texts), tuple(alone)
    return Tokens(prompt_ids, *sides, clashes=(False,) * len(names))


def _ends(processing_class: Processing, tokenizer: PreTrainedTokenizerBase, eos_token: str) -> tuple[str, ...]:
    """The tokens that end a completion: the given one, and the one that the chat template ends an answer with."""
    end = answers_end(processing_class)
    special = tokenizer.added_tokens_encoder.get(end)
    return (eos_token,) if special is None or end == eos_token else (eos_token, end)


def _tokenize_messages(example: Row, names: Sequence[str], processing_class: Processing) -> Tokens:
    arguments = template_arguments(example)
    prompt = for_template(example["prompt"], processing_class)
    prompt_text, prompt_ids = _render_ids(prompt, processing_class, add_generation_prompt=True, **arguments)
    encodings = {prompt_text: prompt_ids}
    completions, repaired, texts, alone, clashes = [], [], [], [], []
    for name in names:
        completion = for_template(example[name], processing_class)
        text, whole = _render_ids(prompt + completion, processing_class, **arguments)
        encodings[text] = whole
        repaired.append(whole[: len(prompt_ids)] != prompt_ids)
        texts.append(text)
        if repaired[-1]:
            start, clash = _start(prompt, completion, prompt_text, text, processing_class, arguments)
            completions.append(encode_alone(text[start:], text_tokenizer(processing_class)))
            encodings[text[start:]] = completions[-1]
        else:
            start, clash = len(text), False
            completions.append(whole[len(prompt_ids) :])
        alone.append(text[start:])
        clashes.append(clash)
    sides = tuple(completions), tuple(repaired), prompt_text, tuple(texts), tuple(alone)
    return Tokens(prompt_ids, *sides, tuple(clashes), encodings)


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


def encode_text(text: str, processing_class: Processing) -> list[int]:
    """Plain text with the special tokens that the tokenizer adds, except those that the text already has."""
    ids = processing_class(text=text)["input_ids"]
    # Processors of images and text answer in batches of one.
    ids = list(ids[0] if isinstance(processing_class, ProcessorMixin) else ids)
    begin = text_tokenizer(processing_class).bos_token_id
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] and _begins_once(text, processing_class) else ids


def _begins_once(text: str, processing_class: Processing) -> bool:
    token = str(text_tokenizer(processing_class).bos_token)
    return text.startswith(token) and not text.startswith(2 * token)


def encode_alone(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's own tokens, without any that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render_ids(messages: list[Any], processing_class: Processing, **arguments: Any) -> tuple[str, list[int]]:
    """The rendered conversation and its ids, rendered once if transformers' own method would tokenize it."""
    text = _render(messages, processing_class, **arguments)
    if getattr(type(processing_class), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template:
        return text, encode_alone(text, text_tokenizer(processing_class))
    result = processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
    ids = result["input_ids"]
    return text, list(ids[0] if isinstance(processing_class, ProcessorMixin) else ids)


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
