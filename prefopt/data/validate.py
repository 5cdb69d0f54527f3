"""Reports, in one pass, every row of a normalised dataset that would train wrongly; can drop them.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset

from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.findings import Problem, Report
from prefopt.data.parts import tables
from prefopt.data.problems import KINDS
from prefopt.data.repeats import Repeats
from prefopt.data.row import Checked, Row, check_texts, is_label
from prefopt.data.schema import kind
from prefopt.data.screen import can_screen, clear_rows, is_of_messages, rows_at, screened_columns
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_whole

if TYPE_CHECKING:
    from prefopt.data.conversation import Processing
    from prefopt.data.row_check import RowCheck

_ROWS_AT_ONCE = 1000

BATCH = 500
"""Rows that are checked together: their texts are encoded in one call."""


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
    if tokenizer is None and isinstance(dataset, Dataset) and not any(name.endswith("_ids") for name in columns):
        return _check_without_tokenizer(dataset, roles)
    check = row_check(dataset, tokenizer, max_length, truncation_mode, vocabulary)
    findings = Findings(check.sides, roles)
    for start, rows in in_batches(dataset):
        for index, (row, checked) in enumerate(zip(rows, check.batch(rows), strict=True), start):
            findings.add(index, row, checked)
    return findings.report()


def _check_without_tokenizer(dataset: Dataset, roles: Collection[str]) -> Report:
    """Rows in order are recognised by whole columns; only the others are read one by one."""
    sides, columns = sides_of(dataset), tuple(dataset.column_names)
    findings = Findings(sides, roles)
    if not can_screen(dataset, sides):
        for index, row in enumerate(dataset):
            findings.add(index, row, check_texts(row, sides, columns))
        return findings.report()
    start = 0
    for table in tables(dataset, screened_columns(columns, sides)):
        unclear = [start + int(place) for place in (~clear_rows(table, sides)).nonzero()[0]]
        rows = rows_at(dataset, unclear)
        findings.add_table(start, table, {index: check_texts(row, sides, columns) for index, row in rows})
        start += table.num_rows
    return findings.report()


def in_batches(dataset: Dataset | IterableDataset) -> Iterator[tuple[int, list[Row]]]:
    """The rows of a data set, `BATCH` at a time, and the number of the first of them."""
    rows: list[Row] = []
    start = 0
    for row in dataset:
        rows.append(row)
        if len(rows) == BATCH:
            yield start, rows
            start, rows = start + BATCH, []
    if rows:
        yield start, rows


def row_check(
    dataset: Dataset | IterableDataset,
    tokenizer: Processing | None,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    vocabulary: int | None = None,
) -> RowCheck:
    """What is checked of each row of a normalised dataset."""
    # Imported here because it imports transformers, which a check without a tokenizer does not need.
    from prefopt.data.row_check import RowCheck

    columns = column_names(dataset)
    sides = sides_of(dataset)
    refuse_partial_ids(columns, sides)
    return RowCheck(sides, tuple(columns), tokenizer, max_length, truncation_mode, vocabulary)


def sides_of(dataset: Dataset | IterableDataset) -> tuple[str, ...]:
    """The columns of completions."""
    return ("chosen", "rejected") if kind(dataset) == "pair" else ("completion",)


class Findings:
    """Collects the results of single rows, and of comparisons between rows."""

    def __init__(self, sides: tuple[str, ...], roles: Collection[str] = ("chosen", "rejected")) -> None:
        self._roles = frozenset(roles)
        self._found: dict[str, list[int]] = {}
        self._said: dict[str, str] = {}
        self._origins: dict[int, str] = {}
        self._labels: set[Any] = set()
        self._repeats = Repeats(sides)
        self._labelled = sides == ("completion",)
        self._total = self._plain = self._conversations = 0

    def add(self, index: int, row: Row, checked: Checked) -> None:
        self._total += 1
        self._plain += checked.plain
        self._conversations += isinstance(row.get("prompt"), list)
        repeated = self._repeats.of_row(row) if checked.readable else None
        origin = (row["source"], row["row"]) if "source" in row and "row" in row else None
        self._note(index, checked, repeated, origin)
        if self._labelled and "label" in row:
            self._labels.add(row["label"] if is_label(row["label"]) else None)

    def add_table(self, start: int, table: Any, checked: Mapping[int, Checked]) -> None:
        """Adds rows from number `start` on; those that `checked` does not name have no problem of their own."""
        self._total += table.num_rows
        prompts = table.column("prompt")
        self._conversations += (len(prompts) - prompts.null_count) * is_of_messages(prompts)
        clear = Checked(readable=True)
        readable = [checked.get(start + place, clear).readable for place in range(table.num_rows)]
        for place, (repeated, origin) in enumerate(self._repeats.of_table(table, readable)):
            index = start + place
            if repeated or index in checked:
                self._note(index, checked.get(index, clear), repeated, origin)
        if self._labelled:
            self._labels |= {
                label if is_label(label) else None for label in table.column("label").unique().to_pylist()
            }

    def _note(self, index: int, checked: Checked, repeated: str | None, origin: Any) -> None:
        problems = [*checked.problems, repeated] if repeated else checked.problems
        for problem in problems:
            self._found.setdefault(problem, []).append(index)
        for problem, said in checked.said.items():
            self._said.setdefault(problem, said)
        if problems and origin is not None:
            self._origins[index] = f"{origin[0]}:{origin[1]}"

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
    if isinstance(dataset, Dataset):
        return dataset.select(np.setdiff1d(np.arange(len(dataset)), bad))
    return dataset.filter(_is_kept, with_indices=True, fn_kwargs={"gone": frozenset(bad)})


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
