"""From rows to checked ids in one pass, for the Python API and for streams.

A map-style set is refused as a whole, with every bad row in the message; a stream at its first bad row. It imports
datasets and the rest of this folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.data.collect import PLAIN_NOTE, Findings, one_label_note
from prefopt.data.columns import column_names
from prefopt.data.conversation import Processing, Row
from prefopt.data.errors import DataError
from prefopt.data.findings import Report
from prefopt.data.groups import COMPLETIONS, SCORES, SIDES
from prefopt.data.one_pass import can_pass, one_pass
from prefopt.data.problems import KINDS
from prefopt.data.reuse import Made, ids_for, made_with, with_ids
from prefopt.data.row import Checked, is_label
from prefopt.data.row_check import RowCheck
from prefopt.data.tokenize import tokenize_dataset
from prefopt.data.validate import refuse_partial_ids, row_check
from prefopt.losses.scores import GIVEN_LOGPS

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Prints nothing."""


_FOUND = "found in this row"
_DROPPED_LATER = "no room for a completion"
"""`drop_overlong` drops these rows with a warning."""

_NUMBERS = ("label", SCORES, "weight", *GIVEN_LOGPS, "source", "row")
"""Columns that are checked besides the ids."""

_LABELS_SEEN = 1000
"""After this many rows of a stream with the same label, a note is printed."""

_CHECKED: ContextVar[tuple[Made, ...] | None] = ContextVar("ids of checked rows", default=None)


@contextlib.contextmanager
def rows_are_checked(made: Iterable[Made] = ()) -> Iterator[None]:
    """Inside, map-style sets are not checked, because that was done before. Streams still are.

    Rows that `made` has ids of, by the same tokenizer, get those; sets with other rows are checked and tokenized.
    """
    token = _CHECKED.set(tuple(made))
    try:
        yield
    finally:
        _CHECKED.reset(token)


def tokenize_checked(
    dataset: Dataset | IterableDataset,
    processing_class: Processing,
    *,
    max_length: int | None,
    truncation_mode: str,
    name: str,
    roles: Collection[str] = ("chosen", "rejected"),
    num_proc: int | None = None,
    say: Say = silent,
) -> Dataset | IterableDataset:
    """`tokenize_dataset` with the checks of `validate`.

    Args:
        dataset: normalised, without ids.
        processing_class: the tokenizer or processor.
        max_length: longest prompt and completion; `drop_overlong` handles prompts that leave no room.
        truncation_mode: TRL's.
        name: of the set, for messages.
        roles: what the objective is about.
        num_proc: processes to tokenize with; by default one for each core, if there are thousands of rows.
        say: called with each warning and note, once.

    Raises:
        DataError: naming the rows that cannot be trained on; for a stream, at the first such row.
    """
    made = _CHECKED.get()
    if isinstance(dataset, Dataset) and made is not None:
        usable = made_with(made, processing_class)
        if not usable:
            return tokenize_dataset(dataset, processing_class, num_proc, name)
        if (ids := ids_for(dataset, usable)) is not None:
            return with_ids(dataset, ids)
    check = row_check(dataset, processing_class, max_length, truncation_mode)
    if not isinstance(dataset, Dataset):
        return dataset.map(_Stream(check, name, roles, say), with_indices=True)
    if can_pass(dataset):
        passed = one_pass(dataset, check, roles, num_proc, name)
        _tell(_without_dropped_rows(passed.report), name, say)
        return with_ids(dataset, passed.ids)
    marked = dataset.map(_ids_and_findings, fn_kwargs={"check": check}, num_proc=num_proc, desc=name)
    findings = Findings(check.sides, roles)
    for index, row in enumerate(marked):
        findings.add(index, row, _read(row[_FOUND]))
    _tell(findings.report(), name, say)
    return marked.remove_columns(_FOUND)


def check_ids(
    dataset: Dataset | IterableDataset,
    *,
    max_length: int | None,
    truncation_mode: str,
    name: str,
    roles: Collection[str] = ("chosen", "rejected"),
    say: Say = silent,
) -> Dataset | IterableDataset:
    """The checks for rows that are token ids; arguments and errors as in `tokenize_checked`."""
    columns = column_names(dataset)
    groups = f"{COMPLETIONS}_ids" in columns
    sides = SIDES if groups else ("completion",) if "completion_ids" in columns else ("chosen", "rejected")
    refuse_partial_ids(columns, sides)
    check = RowCheck(sides, tuple(columns), None, max_length, truncation_mode)
    if not isinstance(dataset, Dataset):
        return dataset.map(_Stream(check, name, roles, say), with_indices=True)
    if _CHECKED.get() is None:
        findings = Findings(sides, roles)
        ids = [f"{side}_ids" for side in ("prompt", *sides)]
        looked_at = [column for column in (*ids, *_NUMBERS) if column in columns]
        for index, row in enumerate(dataset.select_columns(looked_at)):
            findings.add(index, row, _without_dropped(check.of_ids(row)))
        _tell(findings.report(), name, say)
    return dataset


def _without_dropped_rows(report: Report) -> Report:
    return replace(report, problems=[problem for problem in report.problems if problem.kind != _DROPPED_LATER])


def _tell(report: Report, name: str, say: Say) -> None:
    if not report.ok:
        raise DataError(
            f"The {name} set: {report.message()}\nRepair these rows, or leave them out with prefopt.data.clean (see "
            "docs/data.md)."
        )
    for problem in report.problems:
        if problem.severity == "warning":
            say(f"the {name} set, {report.line(problem)}")
    for note in report.notes:
        say(f"the {name} set: {note}")


def _ids_and_findings(row: Row, check: RowCheck) -> dict[str, Any]:
    checked = _without_dropped(check(row))
    found = {"problems": checked.problems, "said": checked.said, "readable": checked.readable, "plain": checked.plain}
    names = [f"{name}_ids" for name in ("prompt", *check.sides)]
    return {**(checked.ids or {name: [] for name in names}), _FOUND: json.dumps(found)}


def _without_dropped(checked: Checked) -> Checked:
    checked.problems = [problem for problem in checked.problems if problem != _DROPPED_LATER]
    return checked


def _read(found: str) -> Checked:
    return Checked(**json.loads(found))


class _Stream:
    """Ids of a streamed row, or an error that names it."""

    def __init__(self, check: RowCheck, name: str, roles: Collection[str], say: Say) -> None:
        self._check, self._name, self._roles, self._say = check, name, roles, say
        self._told: set[str] = set()
        self._labels: dict[Any, int] = {}

    def __call__(self, row: Row, index: int) -> dict[str, Any]:
        given = "prompt_ids" in row
        checked = self._check.of_ids(row) if given else self._check(row)
        place = f"row {index} (from 0) of the streamed {self._name} set"
        if row.get("source") is not None and row.get("row") is not None:
            place += f", which is {row['source']}:{row['row']}"
        for problem in checked.problems:
            kind = KINDS[problem]
            text = f"{place}: {problem}. {kind.explanation}{checked.said.get(problem, '')} {kind.advice}".rstrip()
            if problem == _DROPPED_LATER:
                continue
            if kind.severity == "error":
                raise DataError(text)
            if kind.severity == "warning":
                self._tell(problem, f"{text} (Reported once.)")
        if checked.plain:
            self._tell(PLAIN_NOTE, f"the streamed {self._name} set: {PLAIN_NOTE}")
        self._count(row)
        assert given or checked.ids is not None  # a row without an error has them
        return dict(checked.ids or {})

    def _count(self, row: Row) -> None:
        labelled = "completion" in row and is_label(row.get("label"))
        if not labelled or not {"chosen", "rejected"} <= set(self._roles):
            return
        label = bool(row["label"])
        self._labels[label] = self._labels.get(label, 0) + 1
        if self._labels == {label: _LABELS_SEEN}:
            note = one_label_note(label, f"Each of the first {_LABELS_SEEN} rows")
            self._tell("one label", f"the streamed {self._name} set: {note}")

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._say(text)
