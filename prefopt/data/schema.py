"""Recognises the published preference formats and brings them to two: pairs and unpaired feedback.

Pairs have `prompt`, `chosen`, `rejected`; unpaired rows `prompt`, `completion`, `label`. Texts are plain strings or
lists of messages, one of the two throughout. Other columns travel along. No row is dropped or judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

from prefopt.data.columns import (
    PAIR_COLUMNS,
    UNPAIRED_COLUMNS,
    column_names,
    first_rows,
    kind_of_columns,
    missing_columns_message,
    rename_columns,
)
from prefopt.data.errors import DataError
from prefopt.data.transcripts import looks_like_transcript, split_transcripts

Row = dict[str, Any]
Style = Literal["text", "messages"]

# Marks a transcript that could not be parsed: the whole text is kept under this role, so that validation can report
# the row and the file of dropped rows can show it.
UNPARSED = "unparsed transcript"

_PEEKED_ROWS = 64
_MESSAGE = '{"role", "content"}'
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def kind(dataset: Dataset | IterableDataset) -> Literal["pair", "unpaired"]:
    """Which of the two formats a normalised dataset has; an error naming its columns where it has neither."""
    names = column_names(dataset)
    found = kind_of_columns(names)
    if found is None:
        raise DataError(missing_columns_message(names))
    return "pair" if found == "pair" else "unpaired"


def normalise(
    dataset: Dataset | IterableDataset, columns: Mapping[str, str] | None = None, *, transcripts: bool = True
) -> Dataset | IterableDataset:
    """The dataset in canonical columns; unchanged where it has them already.

    Converted are: prompts left implicit in `chosen` and `rejected` (their shared beginning), Human/Assistant
    transcripts, plain prompts beside message completions and the reverse, `messages` + `label`, labels written 0/1.
    `transcripts=False` leaves transcripts the plain text that they are.
    """
    if columns:
        dataset = rename_columns(dataset, columns)
    if kind(dataset) == "pair":
        return _normalise_pairs(dataset, transcripts)
    return _boolean_label(_normalise_unpaired(dataset))


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two whole conversations or texts, and what is left of each.

    Messages: the leading messages that are equal. Text: the common prefix, cut back to a word boundary, the space
    before the first differing word going to the completions (that is how tokenizers cut words). At least one message
    or character stays in each completion.
    """
    most = min(len(chosen), len(rejected))
    shared = 0
    while shared < most and same_texts(chosen[shared], rejected[shared]):
        shared += 1
    if shared == most:
        # One is the beginning of the other, or both are equal: the last item stays in the completion.
        shared = max(0, most - 1)
    if isinstance(chosen, str):
        shared = _word_boundary(chosen, rejected, shared)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def same_texts(left: Any, right: Any) -> bool:
    """Equality of texts, messages or lists of them, a field that is null being the same as one that is not there.

    Arrow gives every message of a column all fields of any of them (`tool_calls: None`).
    """
    return left == right or bool(without_nulls(left) == without_nulls(right))


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _word_boundary(left: str, right: str, cut: int) -> int:
    def splits_a_word(at: int) -> bool:
        return any(side[at - 1 : at].isalnum() and side[at : at + 1].isalnum() for side in (left, right))

    boundary = cut
    while boundary > 0 and splits_a_word(boundary):
        boundary -= 1
    # Scripts without spaces have no boundary to go back to: keep what is shared.
    boundary = boundary or cut
    return boundary - 1 if boundary > 0 and left[boundary - 1] == " " else boundary


def _style(rows: Sequence[Row], column: str) -> Style | None:
    """How a column's texts are written, judged by its first value that is either."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str):
            return "text"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "messages"
    return None


def _normalise_pairs(dataset: Dataset | IterableDataset, read_transcripts: bool) -> Dataset | IterableDataset:
    rows = first_rows(dataset, _PEEKED_ROWS)
    styles = {name: _style(rows, name) for name in PAIR_COLUMNS}
    has_prompt = "prompt" in column_names(dataset)
    transcripts = [
        looks_like_transcript(row.get("chosen")) and looks_like_transcript(row.get("rejected")) for row in rows
    ]
    if read_transcripts and transcripts and 2 * sum(transcripts) >= len(transcripts):
        # A separate prompt column repeats what the transcripts hold.
        return _map(dataset, _from_transcripts, dict.fromkeys(PAIR_COLUMNS, _MESSAGES), "Reading transcripts")
    if styles["chosen"] != styles["rejected"] and None not in (styles["chosen"], styles["rejected"]):
        raise DataError(
            f"Column 'chosen' holds {styles['chosen']} and column 'rejected' holds {styles['rejected']}. "
            "Write both as plain text or both as lists of messages."
        )
    if styles["chosen"] == "messages" and (not has_prompt or styles["prompt"] == "text" or _repeats_prompt(rows)):
        return _map(dataset, _pair_from_messages, _copied(dataset, "chosen"), "Separating prompts")
    if not has_prompt:
        return _map(dataset, _pair_from_text, _copied(dataset, "chosen"), "Separating prompts")
    if styles["prompt"] == "messages" and styles["chosen"] == "text":
        features = {"chosen": _MESSAGES, "rejected": _MESSAGES}
        return _map(dataset, _completions_to_messages, features, "Writing completions as messages")
    return dataset


def _normalise_unpaired(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    names = column_names(dataset)
    rows = first_rows(dataset, _PEEKED_ROWS)
    if not set(UNPAIRED_COLUMNS) <= set(names):
        if _style(rows, "messages") != "messages":
            plain = _style(rows, "messages") == "text"
            found = "plain text" if plain else f"no list of messages in its first {len(rows)} rows"
            raise DataError(f"Column 'messages' holds {found}. It must hold lists of {_MESSAGE} messages.")
        # Removed only after the map, so that nothing of `messages` is lost if it fails.
        features = _copied(dataset, "messages", ("prompt", "completion"))
        return _map(dataset, _from_messages, features, "Separating prompts").remove_columns("messages")
    styles = {name: _style(rows, name) for name in ("prompt", "completion")}
    if styles["completion"] == "messages" and styles["prompt"] == "text":
        return _map(dataset, _prompt_to_messages, {"prompt": _MESSAGES}, "Writing prompts as messages")
    if styles["prompt"] == "messages" and styles["completion"] == "text":
        return _map(dataset, _completions_to_messages, {"completion": _MESSAGES}, "Writing completions as messages")
    return dataset


def _map(
    dataset: Dataset | IterableDataset, function: Callable[[Row], Row], changed: Mapping[str, Any], desc: str
) -> Dataset | IterableDataset:
    """`dataset.map` with the types stated: left to be guessed, a first batch of empty prompts fixes a wrong one."""
    if dataset.features is None or any(feature is None for feature in changed.values()):
        return dataset.map(function)
    features = Features({**dataset.features, **changed})
    if not isinstance(dataset, Dataset):
        return dataset.map(function, features=features)
    try:
        return dataset.map(function, features=features, desc=desc)
    except (TypeError, ValueError, ArrowException) as error:
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{desc}: the columns {', '.join(changed)} do not hold one kind of value throughout: {said}. Write every "
            f"text as a string, or every one as a list of {_MESSAGE} messages."
        ) from error


def _copied(
    dataset: Dataset | IterableDataset, column: str, targets: tuple[str, ...] = PAIR_COLUMNS
) -> dict[str, Any]:
    """Types for the columns cut out of `column`: its own."""
    feature = dataset.features[column] if dataset.features is not None else None
    return dict.fromkeys(targets, feature)


def _from_transcripts(row: Row) -> Row:
    parts = split_transcripts(row["chosen"], row["rejected"])
    if parts is None:
        unread = ([], *([{"role": UNPARSED, "content": row[side]}] for side in ("chosen", "rejected")))
        return dict(zip(PAIR_COLUMNS, unread, strict=True))
    return dict(zip(PAIR_COLUMNS, parts, strict=True))


def _pair_from_text(row: Row) -> Row:
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    return dict(zip(PAIR_COLUMNS, extract_prompt(chosen, rejected), strict=True))


def _pair_from_messages(row: Row) -> Row:
    """Completions given as messages, with no prompt, with it written plainly, or with it repeated in front."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not chosen or not rejected or not isinstance(chosen, list) or not isinstance(rejected, list):
        return {"prompt": _as_messages(prompt, "user"), "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, str) and _role(chosen[0]) == _role(rejected[0]) == "assistant":
        return {"prompt": _as_messages(prompt, "user"), "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, list) and not (_opens_with(chosen, prompt) and _opens_with(rejected, prompt)):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, list):
        return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    return dict(zip(PAIR_COLUMNS, extract_prompt(chosen, rejected), strict=True))


def _repeats_prompt(rows: Sequence[Row]) -> bool:
    """Whether `chosen` holds the conversation from its start although `prompt` holds its start too."""
    return any(
        isinstance(row.get("prompt"), list) and row["prompt"] and _opens_with(row.get("chosen"), row["prompt"])
        for row in rows
    )


def _opens_with(messages: Any, prompt: list[Any]) -> bool:
    return isinstance(messages, list) and len(messages) > len(prompt) and same_texts(messages[: len(prompt)], prompt)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _as_messages(text: Any, role: str) -> Any:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _prompt_to_messages(row: Row) -> Row:
    return {"prompt": _as_messages(row["prompt"], "user")}


def _completions_to_messages(row: Row) -> Row:
    return {name: _as_messages(row[name], "assistant") for name in ("chosen", "rejected", "completion") if name in row}


def _from_messages(row: Row) -> Row:
    """The last message is what the label judges, if it is the assistant's; everything before it is the prompt."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or _role(messages[-1]) != "assistant":
        return {"prompt": messages, "completion": []}
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _boolean_label(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Labels stored as the integers 0 and 1 become booleans; any other value is left for validation to report."""
    feature = dataset.features.get("label") if dataset.features is not None else None
    if isinstance(feature, ClassLabel) or not isinstance(feature, Value) or not re.match(r"u?int", feature.dtype):
        return dataset
    if isinstance(dataset, Dataset) and set(dataset.unique("label")) <= {0, 1}:
        return dataset.cast_column("label", Value("bool"))
    return dataset
