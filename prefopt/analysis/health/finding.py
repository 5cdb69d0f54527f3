"""What a rule reports. Imports the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("serious", "warning", "note")
"""`serious`: the run is lost or soon will be. `warning`: look at it. `note`: good to know."""


@dataclass(frozen=True)
class Finding:
    """What one rule says about a run.

    Attributes:
        rule: the rule's name.
        level: one of `LEVELS`.
        step: the optimizer step of the log line at which it first held.
        text: what happened, with the numbers that show it.
        remedy: what to try, options written as they can be copied.
    """

    rule: str
    level: str
    step: int
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level} ({self.rule}, step {self.step}): {self.text}. Try: {self.remedy}"
