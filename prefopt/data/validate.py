"""Looks once through a normalised dataset and reports every row that would train wrongly; drops them if asked.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.problems import KINDS
from prefopt.data.report import Problem, Report
from prefopt.data.schema import UNPARSED, kind, same_texts, without_nulls
from prefopt.data.tokenize import Processing, tokenize_row

Row = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_ANSWERING = frozenset({"assistant", "tool", "function", "ipython"})


def validate(
    dataset: Dataset | IterableDataset, *, tokenizer: Processing | None = None, max_length: int | None = None
) -> Report:
    """Every problem of a normalised dataset, in one pass.

    Lengths are checked where `max_length` is given, from the ids that the rows have (see `tokenize_dataset`) or with
    `tokenizer`, which also finds prompts whose tokens do not begin the tokenized whole.
    """
    names = column_names(dataset)
    sides = ("chosen", "rejected") if kind(dataset) == "pair" else ("completion",)
    if max_length is not None and tokenizer is None and "prompt_ids" not in names:
        raise ValueError("max_length needs a tokenizer, or a dataset that is tokenized already.")
    needed = ("prompt", *sides) if len(sides) == 2 else ("prompt", *sides, "label")
    found: dict[str, list[int]] = {}
    origins: dict[int, str] = {}
    repeats = _Repeats(sides)
    total = 0
    for index, given in enumerate(dataset):
        total += 1
        # Rows of a stream may lack a key that other rows have.
        row = {**dict.fromkeys(needed), **given}
        problems = list(_row_problems(row, sides, names))
        # Rows with broken texts cannot be compared or tokenized.
        if not any(problem in _UNREADABLE for problem in problems):
            problems.extend(repeats.problems(row))
            problems.extend(_length_problems(row, sides, tokenizer, max_length))
        for problem in problems:
            found.setdefault(problem, []).append(index)
        if problems and "source" in names and "row" in names:
            origins[index] = f"{row['source']}:{row['row']}"
    if total == 0:
        raise DataError("The dataset has no rows. Check the file and the split.")
    problems_in_order = [
        Problem(name, spec.severity, found[name], spec.explanation, spec.advice)
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
            f"{report.message()}\nRepair these rows, or pass --on-bad-rows drop to train without them "
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
    # Under another name first, one for each process: whoever reads `path` finds a whole file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            for index, row in rows:
                line: dict[str, Any] = {"row": index, "reasons": reasons[index], "example": dict(row)}
                if index in report.origins:
                    line["origin"] = report.origins[index]
                stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
    return math.isfinite(value) and float(value) >= 0


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


def _length_problems(
    row: Row, sides: tuple[str, ...], tokenizer: Processing | None, max_length: int | None
) -> Iterator[str]:
    if "prompt_ids" in row:
        ids: Mapping[str, Any] = row
    elif tokenizer is not None:
        try:
            ids = tokenize_row(row, tokenizer)
        except DataError:
            raise
        except Exception:
            yield "refused by the chat template"
            return
    else:
        return
    if ids.get("boundary"):
        yield "prompt is no token prefix"
    if max_length is not None:
        if len(ids["prompt_ids"]) >= max_length:
            yield "no room for a completion"
        elif any(len(ids["prompt_ids"]) + len(ids[f"{side}_ids"]) > max_length for side in sides):
            yield "truncated completion"
