"""Reports, in one pass, every row of a normalised dataset that would train wrongly; can drop them.

Nothing here changes a row. It may import datasets, transformers and the rest of this folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset

from prefopt.data.collect import Findings
from prefopt.data.columns import column_names
from prefopt.data.errors import DataError
from prefopt.data.findings import Report
from prefopt.data.groups import SIDES
from prefopt.data.one_pass import can_pass, one_pass
from prefopt.data.parts import tables
from prefopt.data.row import Row, check_texts
from prefopt.data.schema import kind
from prefopt.data.screen import can_screen, clear_rows, rows_at, screened_columns
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_whole

if TYPE_CHECKING:
    from prefopt.data.conversation import Processing
    from prefopt.data.row_check import RowCheck

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
    if isinstance(dataset, Dataset) and tokenizer is not None and can_pass(dataset):
        return one_pass(dataset, check, roles).report
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
    by_kind = {"pair": ("chosen", "rejected"), "unpaired": ("completion",), "group": SIDES}
    return by_kind[kind(dataset)]


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
    found = [
        name
        for name in ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "completions_ids")
        if name in names
    ]
    if found and set(found) != set(wanted):
        raise DataError(
            f"The data has the columns {' and '.join(found)}, so its rows are taken for tokenized ones, which have "
            f"{', '.join(wanted)}. Add what is missing, or remove them all to have the texts tokenized."
        )
