"""Looks once through a normalised dataset and reports every row that would train wrongly; drops them if asked.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.messages import without_nulls
from prefopt.data.problems import KINDS
from prefopt.data.report import Problem, Report
from prefopt.data.row import TOLD, UNREADABLE, row_problems
from prefopt.data.schema import kind
from prefopt.data.templates import template_trouble
from prefopt.data.tokenize import Processing, text_tokenizer, tokenize_row
from prefopt.files import write_whole

Row = Mapping[str, Any]


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
        problems = list(row_problems(row, sides, names))
        # Rows with broken texts cannot be compared or tokenized.
        if not any(problem in UNREADABLE for problem in problems):
            problems.extend(repeats.problems(row))
            problems.extend(tokens.problems(row, told=any(problem in TOLD for problem in problems)))
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
