"""What a rule reports. Imports the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = ("serious", "warning", "note")
"""`serious`: the run is lost or soon will be. `warning`: look at it. `note`: good to know."""


SHOWN_ROWS = 5
"""Rows that the text of a finding names; all of them are in `rows`."""


@dataclass(frozen=True)
class Finding:
    """What one rule says about a run.

    Attributes:
        rule: the rule's name.
        level: one of `LEVELS`.
        step: the optimizer step of the log line at which it first held.
        text: what happened, with the numbers that show it.
        remedy: what to try, options written as they can be copied.
        rows: row numbers from 0 of what the text speaks of, in the set that it names; empty where no rows are known.
    """

    rule: str
    level: str
    step: int
    text: str
    remedy: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.level} ({self.rule}, step {self.step}): {self.text}. Try: {self.remedy}"

    def as_object(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**vars(self), "rows": list(self.rows)}


def first_rows(rows: Sequence[int]) -> str:
    """The first rows, as a text shows them: `rows 3, 8, 12 and 4 more`."""
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"row{'' if len(rows) == 1 else 's'} {shown}{more}"
