"""Collects what is found in single rows, compares the rows, and reports both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from prefopt.data.errors import DataError
from prefopt.data.findings import Problem, Report
from prefopt.data.problems import KINDS
from prefopt.data.repeats import Repeats
from prefopt.data.row import Checked, Row, is_label
from prefopt.data.screen import is_of_messages


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

    def add_table(self, start: int, table: Any, checked: Mapping[int, Checked], plain: int = 0) -> None:
        """Adds rows from number `start` on, `plain` of them plain text.

        Those that `checked` does not name have no problem of their own.
        """
        self._total += table.num_rows
        self._plain += plain
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

    def facts(self) -> dict[str, Any]:
        """All that `report` needs, as JSON can hold it."""
        rows = {"found": self._found, "said": self._said, "origins": self._origins}
        counts = {"total": self._total, "plain": self._plain, "conversations": self._conversations}
        return {**rows, **counts, "labels": list(self._labels)}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], sides: tuple[str, ...], roles: Collection[str]) -> Findings:
        """The findings that `facts` were taken from; no rows can be added."""
        findings = cls(sides, roles)
        findings._found, findings._said = facts["found"], facts["said"]
        findings._origins = {int(row): origin for row, origin in facts["origins"].items()}
        findings._labels = set(facts["labels"])
        findings._total, findings._plain = facts["total"], facts["plain"]
        findings._conversations = facts["conversations"]
        return findings

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
        for role, label in (("chosen", True), ("rejected", False)):
            if self._roles == {role} and self._labels == {not label}:
                notes.append(
                    f"Each of the {self._total} rows has the label {str(not label).lower()}: an objective that learns "
                    f"from rows with the label {str(label).lower()} alone learns nothing."
                )
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
