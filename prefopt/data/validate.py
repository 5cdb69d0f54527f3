"""Looks once through a normalised dataset and reports every row that would train wrongly; drops them if asked.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from prefopt.columns import GIVEN_LOGPS
from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.problems import KINDS
from prefopt.data.report import Problem, Report
from prefopt.data.schema import UNPARSED, kind, same_texts, without_nulls
from prefopt.data.templates import template_trouble
from prefopt.data.tokenize import Processing, text_tokenizer, tokenize_row
from prefopt.files import write_whole

Row = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})

MAX_WEIGHT = 1e9
"""Largest weight of a row: beyond it other rows do not count, and float32 does not reach far."""

_NOT_THE_TEMPLATES = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *(
            "continue_final_message",
            "tokenize",
            "return_dict",
            "return_tensors",
            "padding",
            "truncation",
            "max_length",
        ),
    }
)
"""Arguments of `apply_chat_template` that a row may not set: they decide what is tokenized, not how it reads."""

_ANSWERING = frozenset({"assistant", "tool", "function", "ipython"})


def validate(
    dataset: Dataset | IterableDataset,
    *,
    tokenizer: Processing | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
) -> Report:
    """Every problem of a normalised dataset, in one pass.

    Lengths are checked where `max_length` is given, from the ids that the rows have (see `tokenize_dataset`) or with
    `tokenizer`, which also finds prompts whose tokens do not begin the tokenized whole. `vocabulary` is the number of
    tokens that the model has embeddings for.
    """
    names = column_names(dataset)
    sides = ("chosen", "rejected") if kind(dataset) == "pair" else ("completion",)
    if max_length is not None and tokenizer is None and "prompt_ids" not in names:
        raise ValueError("max_length needs a tokenizer, or a dataset that is tokenized already.")
    _refuse_partial_ids(names, sides)
    needed = ("prompt", *sides) if len(sides) == 2 else ("prompt", *sides, "label")
    found: dict[str, list[int]] = {}
    origins: dict[int, str] = {}
    repeats, tokens = _Repeats(sides), _Tokens(sides, tokenizer, max_length, vocabulary)
    total = 0
    for index, given in enumerate(dataset):
        total += 1
        # Rows of a stream may lack a key that other rows have.
        row = {**dict.fromkeys(needed), **given}
        problems = list(_row_problems(row, sides, names))
        # Rows with broken texts cannot be compared or tokenized.
        if not any(problem in _UNREADABLE for problem in problems):
            problems.extend(repeats.problems(row))
            problems.extend(tokens.problems(row, told=any(problem in _TOLD for problem in problems)))
        for problem in problems:
            found.setdefault(problem, []).append(index)
        if problems and "source" in names and "row" in names:
            origins[index] = f"{row['source']}:{row['row']}"
    if total == 0:
        raise DataError("The dataset has no rows. Check the file and the split.")
    problems_in_order = [
        Problem(name, spec.severity, found[name], spec.explanation + tokens.said.get(name, ""), spec.advice)
        for name, spec in KINDS.items()
        if name in found
    ]
    return Report(problems_in_order, total, origins)


def clean(
    dataset: Dataset | IterableDataset,
    report: Report,
    on_bad_rows: Literal["error", "drop"] = "error",
    dropped_path: str | os.PathLike[str] | None = None,
) -> Dataset | IterableDataset:
    """The dataset without the rows that have errors: refused (`error`), or removed and written down (`drop`).

    The file at `dropped_path` holds one JSON object a line: the row's number, its reasons and the row itself.
    """
    if on_bad_rows not in ("error", "drop"):
        raise ValueError(f"on_bad_rows is {on_bad_rows!r}; it must be 'error' or 'drop'.")
    if report.ok:
        return dataset
    bad = report.bad_rows
    if on_bad_rows == "error":
        raise DataError(
            f"{report.message()}\nRepair these rows, or pass --on_bad_rows drop to train without them "
            "(they are written to a file beside the run)."
        )
    if len(bad) == report.total:
        raise DataError(f"Every row would be dropped, so nothing is left to train on.\n{report.message()}")
    if dropped_path is None:
        raise ValueError("on_bad_rows='drop' needs dropped_path: dropped rows are always written down.")
    _write_dropped(dataset, report, bad, Path(dropped_path))
    gone = frozenset(bad)
    if isinstance(dataset, Dataset):
        return dataset.select([index for index in range(len(dataset)) if index not in gone])
    return dataset.filter(_is_kept, with_indices=True, fn_kwargs={"gone": gone})


def _is_kept(row: Row, index: int, gone: frozenset[int]) -> bool:
    return index not in gone


def _write_dropped(dataset: Dataset | IterableDataset, report: Report, bad: list[int], path: Path) -> None:
    reasons = report.reasons(bad)
    rows: Iterable[tuple[int, Row]]
    if isinstance(dataset, Dataset):
        rows = ((index, dataset[index]) for index in bad)
    else:
        rows = ((index, row) for index, row in enumerate(dataset) if index in reasons)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as stream:
            for index, row in rows:
                line: dict[str, Any] = {"row": index, "reasons": reasons[index], "example": dict(row)}
                if index in report.origins:
                    line["origin"] = report.origins[index]
                stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    write_whole(path, write)


_TOLD = frozenset(name for name in KINDS if name.startswith(("empty", "chosen equals")))
_UNREADABLE = frozenset(name for name in KINDS if name.startswith(("unparseable", "wrong type", "null", "wrong role")))


def _row_problems(row: Row, sides: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Problems that show in a row by itself, each at most once."""
    if any(_is_unparsed(row[side]) for side in sides):
        yield "unparseable transcript"
        return
    yield from _text_problems(row["prompt"], "prompt")
    for side in sides:
        yield from _text_problems(row[side], side)
    if len({isinstance(row[name], list) for name in ("prompt", *sides) if row[name] is not None}) > 1:
        yield "wrong type: text beside messages"
    if sides == ("completion",):
        if not isinstance(row["label"], bool):
            yield "wrong type: label"
    elif row["chosen"] is not None and same_texts(row["chosen"], row["rejected"]):
        yield "chosen equals rejected"
    if "weight" in names and not _is_weight(row.get("weight")):
        yield "bad weight"
    if any(name in names and not _is_finite(row.get(name)) for name in GIVEN_LOGPS):
        yield "bad log-probability"
    if isinstance(row["prompt"], list):
        if not _are_tools(row.get("tools")):
            yield "wrong type: tools"
        if not _are_template_arguments(row.get("chat_template_kwargs")):
            yield "wrong type: chat_template_kwargs"


def _is_unparsed(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") == UNPARSED


def _text_problems(value: Any, column: str) -> Iterator[str]:
    if value is None:
        yield f"null {column}"
    elif isinstance(value, str):
        if not value.strip():
            yield f"empty {column}"
    elif isinstance(value, list):
        yield from _message_problems(value, column)
    else:
        yield f"wrong type: {column}"


def _message_problems(messages: list[Any], column: str) -> Iterator[str]:
    if not messages:
        yield f"empty {column}"
        return
    if not all(_is_message(message) for message in messages):
        yield f"wrong type: {column}"
        return
    roles = [message["role"] for message in messages]
    if not ROLES.issuperset(roles):
        yield f"wrong role: unknown in {column}"
    elif column == "prompt":
        if roles[-1] == "assistant":
            yield "wrong role: prompt ends with assistant"
    elif roles[0] not in _ANSWERING or roles[-1] not in _ANSWERING:
        yield f"wrong role: {column} is not the assistant's"
    elif not _ANSWERING.issuperset(roles):
        yield f"user turn inside {column}"
    if _is_empty(messages[-1]):
        yield f"empty {column}"


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return content is None or isinstance(content, str | list)


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Neither text nor a part (an image) nor a tool call: there is nothing to read or to learn."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return False
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or any(isinstance(text, str) and text.strip() for text in texts):
            return False
    return not any(message.get(name) for name in ("tool_calls", "function_call"))


def _is_weight(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    number: Any = value  # a comparison with nan is false
    return bool(0 <= number <= MAX_WEIGHT)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _are_tools(value: Any) -> bool:
    """A list of functions' descriptions, or the JSON text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return not value or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value))


def _are_template_arguments(value: Any) -> bool:
    return not value or (isinstance(value, dict) and not _NOT_THE_TEMPLATES.intersection(without_nulls(value)))


def _refuse_partial_ids(names: list[str], sides: tuple[str, ...]) -> None:
    """Ids come all together or not at all."""
    wanted = ("prompt_ids", *(f"{side}_ids" for side in sides))
    found = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids") if name in names]
    if found and set(found) != set(wanted):
        raise DataError(
            f"The data has the columns {' and '.join(found)}, so its rows are taken for tokenized ones, which have "
            f"{', '.join(wanted)}. Add what is missing, or remove them all to have the texts tokenized."
        )


class _Repeats:
    """Remembers every row's texts as digests (16 bytes each), to find the same pair or its contradiction again."""

    def __init__(self, sides: tuple[str, ...]) -> None:
        self._sides = sides
        self._seen: dict[bytes, Any] = {}

    def problems(self, row: Row) -> Iterator[str]:
        # A mixture repeats rows of its smaller sources on purpose.
        origin = (row["source"], row["row"]) if "source" in row and "row" in row else None
        prompt = _digest([row["prompt"], row.get("tools")])
        texts = [_digest(row[side]) for side in self._sides]
        if len(texts) == 2:
            key, opposite = prompt + texts[0] + texts[1], prompt + texts[1] + texts[0]
        else:
            key, opposite = (prompt + texts[0] + str(label).encode() for label in (row["label"], not row["label"]))
        if key in self._seen and (origin is None or self._seen[key] != origin):
            yield "duplicate row"
        elif opposite != key and opposite in self._seen:
            yield "contradicts an earlier row"
        self._seen.setdefault(key, origin)


def _digest(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(without_nulls(value), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()


class _Tokens:
    """What only tokens show, from a row's own ids or the tokenizer's: nothing to learn from, no room, refusals.

    Attributes:
        said: what the first refusal of each kind said, to stand behind its explanation.
    """

    def __init__(
        self, sides: tuple[str, ...], tokenizer: Processing | None, max_length: int | None, vocabulary: int | None
    ) -> None:
        self._sides = sides
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._embedded = vocabulary
        self._vocabulary = None if tokenizer is None else len(text_tokenizer(tokenizer))
        self.said: dict[str, str] = {}

    def problems(self, row: Row, told: bool = False) -> Iterator[str]:
        """`told`: the texts are known to be empty or equal, so that their tokens are as well."""
        ids: Mapping[str, Any] = row
        if "prompt_ids" in row:
            if not all(self._are_ids(row.get(f"{name}_ids")) for name in ("prompt", *self._sides)):
                yield "wrong type: ids"
                return
        elif self._tokenizer is not None:
            try:
                ids = tokenize_row(row, self._tokenizer)
            except DataError:
                raise
            except Exception as error:
                yield self._refused(error, isinstance(row["prompt"], list))
                return
        else:
            return
        prompt, *completions = (ids[f"{name}_ids"] for name in ("prompt", *self._sides))
        if told:
            pass
        elif not prompt or not all(completions):
            yield "no tokens"
        elif len(completions) == 2 and completions[0] == completions[1]:
            yield "same tokens"
        if (
            self._embedded is not None
            and max(map(max, filter(None, (prompt, *completions))), default=0) >= self._embedded
        ):
            yield "beyond the vocabulary"
        if ids.get("boundary"):
            yield "prompt is no token prefix"
        if self._max_length is not None:
            if len(prompt) >= self._max_length:
                yield "no room for a completion"
            elif any(len(prompt) + len(completion) > self._max_length for completion in completions):
                yield "truncated completion"

    def _are_ids(self, value: Any) -> bool:
        whole = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        return whole and (self._vocabulary is None or max(value, default=0) < self._vocabulary)

    def _refused(self, error: Exception, by_template: bool) -> str:
        kind = "refused by the chat template" if by_template else "refused by the tokenizer"
        if by_template:
            if not getattr(self._tokenizer, "chat_template", None):
                raise DataError(
                    "The rows are conversations, but the tokenizer has no chat template. Pass one with "
                    "--chat_template, or give prompt and completions as plain text."
                ) from error
            if isinstance(error, TemplateSyntaxError | SecurityError):
                raise DataError(template_trouble(error)) from error
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".") or type(error).__name__
        self.said.setdefault(kind, f" The first said: {reason}.")
        return kind
