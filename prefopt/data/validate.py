"""Reports, in one pass, every row of a normalised dataset that would train wrongly; can drop them.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from prefopt.data.columns import column_names
from prefopt.data.conversation import Processing, Row
from prefopt.data.errors import DataError
from prefopt.data.findings import Problem, Report
from prefopt.data.messages import without_nulls
from prefopt.data.problems import KINDS
from prefopt.data.row import is_label
from prefopt.data.row_check import Checked, RowCheck
from prefopt.data.schema import kind
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_whole


def validate(
    dataset: Dataset | IterableDataset,
    *,
    tokenizer: Processing | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    vocabulary: int | None = None,
    roles: Collection[str] = ("chosen", "rejected"),
) -> Report:
    """Every problem of a normalised dataset, in one pass.

    Lengths are checked if `max_length` is given, from the ids that the rows have (see `tokenize_dataset`) or with
    `tokenizer`; with a tokenizer its ids are also decoded and compared (see `round_trip`). `truncation_mode` is
    TRL's. `vocabulary` is the number of tokens that the model has embeddings for. Labels of only one kind are noted if
    the objective has both `roles`.
    """
    columns = column_names(dataset)
    if max_length is not None and tokenizer is None and "prompt_ids" not in columns:
        raise UsageError("max_length needs a tokenizer, or a dataset that is tokenized already.")
    check = row_check(dataset, tokenizer, max_length, truncation_mode, vocabulary)
    findings = Findings(check.sides, roles)
    for index, row in enumerate(dataset):
        findings.add(index, row, check(row))
    return findings.report()


def row_check(
    dataset: Dataset | IterableDataset,
    tokenizer: Processing | None,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    vocabulary: int | None = None,
) -> RowCheck:
    """What is checked of each row of a normalised dataset."""
    columns = column_names(dataset)
    sides = ("chosen", "rejected") if kind(dataset) == "pair" else ("completion",)
    refuse_partial_ids(columns, sides)
    return RowCheck(sides, tuple(columns), tokenizer, max_length, truncation_mode, vocabulary)


class Findings:
    """Collects the results of single rows, and of comparisons between rows."""

    def __init__(self, sides: tuple[str, ...], roles: Collection[str] = ("chosen", "rejected")) -> None:
        self._roles = frozenset(roles)
        self._found: dict[str, list[int]] = {}
        self._said: dict[str, str] = {}
        self._origins: dict[int, str] = {}
        self._labels: set[Any] = set()
        self._repeats = _Repeats(sides)
        self._labelled = sides == ("completion",)
        self._total = self._plain = self._conversations = 0

    def add(self, index: int, row: Row, checked: Checked) -> None:
        self._total += 1
        self._plain += checked.plain
        self._conversations += isinstance(row.get("prompt"), list)
        problems = [*checked.problems, *(self._repeats.problems(row) if checked.readable else ())]
        for problem in problems:
            self._found.setdefault(problem, []).append(index)
        for problem, said in checked.said.items():
            self._said.setdefault(problem, said)
        if problems and "source" in row and "row" in row:
            self._origins[index] = f"{row['source']}:{row['row']}"
        if self._labelled and "label" in row:
            self._labels.add(row["label"] if is_label(row["label"]) else None)

    def report(self) -> Report:
        """Everything, errors first.

        Raises:
            DataError: if there was no row.
        """
        if self._total == 0:
            raise DataError("The dataset has no rows. Check the file and the split.")
        problems = [
            Problem(name, spec.severity, self._found[name], spec.explanation + self._said.get(name, ""), spec.advice)
            for name, spec in KINDS.items()
            if name in self._found
        ]
        notes = [PLAIN_NOTE] if self._plain == self._total else []
        if self._plain and self._conversations:
            notes.append(
                f"Plain text among conversations, in {self._plain} of the {self._total} rows: the chat template is "
                "not applied to it. Write all rows one way."
            )
        both = {"chosen", "rejected"} <= self._roles and self._total > 1
        if both and self._labels in ({True}, {False}):
            notes.append(one_label_note(self._labels == {True}, f"Each of the {self._total} rows"))
        return Report(problems, self._total, self._origins, notes)


PLAIN_NOTE = (
    "The texts are plain, so the tokenizer's chat template is not applied to them. Give messages if the model is to "
    "answer in its chat format."
)


def one_label_note(label: bool, rows: str) -> str:
    """For labels of one kind."""
    other = str(not label).lower()
    return (
        f"{rows} has the label {str(label).lower()}: an objective that sets desirable completions against undesirable "
        f"ones (kto, bco) has nothing to compare with. Add rows with the label {other}."
    )


def clean(
    dataset: Dataset | IterableDataset,
    report: Report,
    on_bad_rows: Literal["error", "drop"] = "error",
    dropped_path: str | os.PathLike[str] | None = None,
) -> Dataset | IterableDataset:
    """The dataset without the rows that have errors: an error (`error`), or removed and written to a file (`drop`).

    The file at `dropped_path` holds one JSON object per line: the row's number, its reasons and the row itself.
    """
    if on_bad_rows not in ("error", "drop"):
        raise UsageError(f"on_bad_rows is {on_bad_rows!r}; it must be 'error' or 'drop'.")
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
        raise UsageError("on_bad_rows='drop' needs dropped_path: dropped rows are always written down.")
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


def refuse_partial_ids(names: list[str], sides: tuple[str, ...]) -> None:
    """Either all ids are there or none."""
    wanted = ("prompt_ids", *(f"{side}_ids" for side in sides))
    found = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids") if name in names]
    if found and set(found) != set(wanted):
        raise DataError(
            f"The data has the columns {' and '.join(found)}, so its rows are taken for tokenized ones, which have "
            f"{', '.join(wanted)}. Add what is missing, or remove them all to have the texts tokenized."
        )


class _Repeats:
    """Stores every row's texts as digests (16 bytes each), to find repeated or contradicting pairs."""

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
            labels = bool(row["label"]), not row["label"]
            key, opposite = (prompt + texts[0] + str(label).encode() for label in labels)
        if key in self._seen and (origin is None or self._seen[key] != origin):
            yield "duplicate row"
        elif opposite != key and opposite in self._seen:
            yield "contradicts an earlier row"
        self._seen.setdefault(key, origin)


def _digest(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(without_nulls(value), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
