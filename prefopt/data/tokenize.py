"""Text to token ids, one row at a time: the prompt's tokens and each completion's.

The ids are TRL's wherever the tokenized prompt begins the tokenized prompt + completion. Where it does not, the
prompt stays whole, as the model meets it at inference (TRL cuts its end off). It imports transformers and datasets,
never trl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.templates import time_limit

Row = Mapping[str, Any]
Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

# A completion that no template treats specially and no generation prompt contains: it shows where completions begin.
_PLACEHOLDER = "\u241fcompletion\u241f"


def tokenize_row(example: Row, processing_class: Processing, eos_token: str | None = None) -> dict[str, Any]:
    """`prompt_ids` with `chosen_ids` and `rejected_ids`, or with `completion_ids`, and the flag `boundary`.

    `boundary` is True where the tokenized prompt was not the beginning of the tokenized whole for at least one
    completion, so that the completion was tokenized on its own behind the whole prompt. `eos_token` ends plain
    completions that do not end with it (conversations end as their template says); default: the tokenizer's.
    """
    names = ("chosen", "rejected") if "chosen" in example else ("completion",)
    if isinstance(example["prompt"], list):
        prompt_ids, completions = _tokenize_messages(example, names, processing_class)
    else:
        prompt_ids, completions = _tokenize_text(example, names, processing_class, eos_token)
    row: dict[str, Any] = {"prompt_ids": prompt_ids}
    boundary = False
    for name, (ids, repaired) in zip(names, completions, strict=True):
        row[f"{name}_ids"] = ids
        boundary = boundary or repaired
    return {**row, "boundary": boundary}


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: Processing,
    num_proc: int | None = None,
    desc: str | None = None,
    eos_token: str | None = None,
) -> Dataset | IterableDataset:
    """Adds the id columns to every row of a normalised dataset; one that has them is returned untouched."""
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


def text_tokenizer(processing_class: Processing) -> PreTrainedTokenizerBase:
    """The tokenizer itself, which a multimodal processor carries inside."""
    if isinstance(processing_class, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
        return tokenizer
    return processing_class


def _tokenize_text(
    example: Row, names: Sequence[str], processing_class: Processing, eos_token: str | None
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    prompt = example["prompt"]
    tokenizer = text_tokenizer(processing_class)
    eos_token = eos_token or tokenizer.eos_token
    if not eos_token:
        raise DataError(
            "The tokenizer has no end-of-sequence token, and plain completions must end with one. "
            "Set tokenizer.eos_token, or pass eos_token."
        )
    prompt_ids = _encode(prompt, processing_class)
    # Some tokenizers end every text with the end token; behind a prompt that does not contain it, it is no context.
    eos_id = tokenizer.convert_tokens_to_ids(eos_token)
    if prompt_ids and prompt_ids[-1] == eos_id and not prompt.endswith(eos_token):
        prompt_ids = prompt_ids[:-1]
    completions = []
    for name in names:
        text = example[name] if example[name].endswith(eos_token) else example[name] + eos_token
        whole = _encode(prompt + text, processing_class)
        repaired = whole[: len(prompt_ids)] != prompt_ids
        completions.append((_alone(text, tokenizer) if repaired else whole[len(prompt_ids) :], repaired))
    return prompt_ids, completions


def _tokenize_messages(
    example: Row, names: Sequence[str], processing_class: Processing
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    with time_limit("the chat template"):
        return _render_messages(example, names, processing_class)


def _render_messages(
    example: Row, names: Sequence[str], processing_class: Processing
) -> tuple[list[int], list[tuple[list[int], bool]]]:
    prompt = example["prompt"]
    arguments = _template_arguments(example)
    prompt_ids = _render_ids(prompt, processing_class, add_generation_prompt=True, **arguments)
    completions = []
    for name in names:
        whole = _render_ids(prompt + example[name], processing_class, **arguments)
        repaired = whole[: len(prompt_ids)] != prompt_ids
        if repaired:
            text = _completion_text(prompt, example[name], processing_class, arguments)
            completions.append((_alone(text, text_tokenizer(processing_class)), True))
        else:
            completions.append((whole[len(prompt_ids) :], False))
    return prompt_ids, completions


def _completion_text(
    prompt: list[Any], completion: list[Any], processing_class: Processing, arguments: dict[str, Any]
) -> str:
    """What the rendered conversation holds behind the prompt: its text after the common beginning of both.

    A completion may itself begin like the end of the prompt (`<think>`), which the common beginning would swallow;
    rendering a placeholder in its place shows where completions begin.
    """
    opening = _render(prompt, processing_class, add_generation_prompt=True, **arguments)
    whole = _render(prompt + completion, processing_class, **arguments)
    start = _shared(opening, whole)
    if completion:
        stand_in = {"role": completion[0]["role"], "content": _PLACEHOLDER}
        start = min(start, _shared(opening, _render([*prompt, stand_in], processing_class, **arguments)))
    return whole[start:]


def _template_arguments(example: Row) -> dict[str, Any]:
    """Tools (a list, or JSON as some sets store it) and chat-template arguments; nulls are columns of other rows."""
    tools = example.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    extra = example.get("chat_template_kwargs") or {}
    return {"tools": tools, **{name: value for name, value in extra.items() if value is not None}}


def _encode(text: str, processing_class: Processing) -> list[int]:
    ids = processing_class(text=text)["input_ids"]
    # Processors of images and text answer in batches of one.
    return list(ids[0] if isinstance(processing_class, ProcessorMixin) else ids)


def _alone(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render_ids(messages: list[Any], processing_class: Processing, **arguments: Any) -> list[int]:
    result = processing_class.apply_chat_template(
        _for_template(messages, processing_class), tokenize=True, return_dict=True, **arguments
    )
    ids = result["input_ids"]
    return list(ids[0] if isinstance(processing_class, ProcessorMixin) else ids)


def _render(messages: list[Any], processing_class: Processing, **arguments: Any) -> str:
    return str(
        processing_class.apply_chat_template(_for_template(messages, processing_class), tokenize=False, **arguments)
    )


def _for_template(messages: list[Any], processing_class: Processing) -> list[Any]:
    """Templates of multimodal models expect a list of parts where text models expect a string."""
    if not isinstance(processing_class, ProcessorMixin):
        return messages
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _shared(left: str, right: str) -> int:
    """Length of the longest common beginning."""
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length
