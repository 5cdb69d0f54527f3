"""Results of validation: problems with their rows, as counts, as a table, and as the message that stops a run.

How problems are found is in `validate.py`. Imports rich and `prefopt.safety.tables` alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table
from rich.text import Text

from prefopt.safety.tables import table

Severity = Literal["error", "warning", "info"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_SHOWN = 5


@dataclass
class Problem:
    """One kind of problem. `rows` are the dataset's row numbers from 0; `advice` says what to do."""

    kind: str
    severity: Severity
    rows: list[int]
    explanation: str
    advice: str = ""


@dataclass
class Report:
    """All problems of a dataset, errors first.

    `origins` names a row's file and its row there, for mixed sets. `notes` are sentences about the set
    as a whole.
    """

    problems: list[Problem]
    total: int
    origins: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No row has an error; there may be warnings."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def bad_rows(self) -> list[int]:
        """Rows with at least one error, in order."""
        return sorted({row for problem in self.problems if problem.severity == "error" for row in problem.rows})

    def counts(self) -> dict[str, int]:
        return {problem.kind: len(problem.rows) for problem in self.problems}

    def reasons(self, rows: Iterable[int]) -> dict[int, list[str]]:
        """The errors of each of `rows`, by kind."""
        found: dict[int, list[str]] = {row: [] for row in rows}
        for problem in self.problems:
            if problem.severity == "error":
                for row in problem.rows:
                    if row in found:
                        found[row].append(problem.kind)
        return found

    def first_rows(self, problem: Problem, shown: int = _SHOWN) -> str:
        names = [self.origins.get(row, str(row)) for row in problem.rows[:shown]]
        return ", ".join(names) + (" ..." if len(problem.rows) > shown else "")

    def _first_by_file(self, problem: Problem, shown: int = _SHOWN) -> str:
        """As `first_rows`, each file named once: `a.jsonl:3, 8; b.jsonl:1`."""
        files: dict[str, list[str]] = {}
        for row in problem.rows[:shown]:
            file, _, number = self.origins.get(row, str(row)).rpartition(":")
            files.setdefault(file, []).append(number)
        named = (f"{file}:{', '.join(rows)}" if file else ", ".join(rows) for file, rows in files.items())
        return "; ".join(named) + (" ..." if len(problem.rows) > shown else "")

    def table(self) -> Table:
        """Problem with its severity, count, what to do, and below that the first rows: paths may be long."""
        bad = len(self.bad_rows)
        title = f"{self.total} rows, {bad} with errors" if self.problems else f"{self.total} rows, no problem found"
        made = table(
            "problem", "rows", "what it means, what to do; first rows, numbered from 0", right=("rows",),
            title=title, show_lines=True,
        )  # fmt: skip
        for problem in self.problems:
            # As plain text: row names and texts may hold the brackets that rich reads as markup.
            made.add_row(
                Text(f"{problem.kind}\n").append(problem.severity, style=_STYLES[problem.severity]),
                str(len(problem.rows)),
                Text(f"{problem.explanation} {problem.advice}".strip() + f"\nFirst: {self._first_by_file(problem)}"),
            )
        return made

    def message(self) -> str:
        """The report as text for an error: one line per problem."""
        lines = [f"{len(self.bad_rows)} of {self.total} rows cannot be trained on (rows are numbered from 0):"]
        for problem in self.problems:
            lines.append(f"  {self.line(problem)}")
        return "\n".join(lines)

    def line(self, problem: Problem) -> str:
        """One problem as text."""
        mark = "" if problem.severity == "error" else f" [{problem.severity}]"
        plural = "" if len(problem.rows) == 1 else "s"
        counted = f"{problem.kind}{mark}: {len(problem.rows)} row{plural}, first {self.first_rows(problem)}"
        return f"{counted}. {problem.explanation} {problem.advice}".rstrip()
