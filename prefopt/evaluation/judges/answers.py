"""Judges of answers that can be checked: the same text, a regular expression, a number, a mathematical expression.

Each gives 1 for a right answer and 0 for a wrong one or none. The right answer is a column of the prompt's row.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from prefopt.evaluation.judges.base import Candidate, Verdict
from prefopt.safety.errors import UsageError

MARK = "####"
"""What GSM8K writes before a final answer. Reference: Cobbe et al. 2021, arXiv 2110.14168."""

_NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s?/\s?\d+(?!\d|\.\d))?%?")


def number_in(text: str) -> Fraction | None:
    """The number that a whole text stands for: `1,234.5`, `-3`, `$7`, `3/4`, `50%` (50); None for another text."""
    words = re.sub(r"[$,%\s]", "", text.replace("−", "-")).rstrip(".")
    try:
        return Fraction(words)
    except (ValueError, ZeroDivisionError):
        return None


def final_number(text: str) -> Fraction | None:
    """The number after the last `####`, else the last number of the text; None if there is none.

    Signs, thousands commas, decimals and fractions are read; `$` and `%` are ignored.
    """
    if MARK in text:
        text = text.rpartition(MARK)[2].strip().partition("\n")[0]
        numbers = _NUMBER.findall(text)
        return number_in(numbers[0]) if numbers else None
    numbers = _NUMBER.findall(text)
    return number_in(numbers[-1]) if numbers else None


class AnswerJudge:
    """1 if a completion has the right answer, else 0.

    Args:
        kind: `exact` (the whole text but for spaces at its ends), `number` (`final_number`), `regex` (group 1 of the
            last match of `pattern`, or the whole match, must be the answer), `math` (math-verify; an extra).
        column: of the prompt's row, with the right answer; GSM8K's whole solutions are read too.
        pattern: a regular expression, for `regex`.
        name: of the judge.
    """

    cached = False  # checking is faster than looking up

    def __init__(self, kind: str, column: str = "answer", pattern: str = "", name: str = ""):
        if kind not in _CHECKS and kind != "regex":
            raise UsageError(f"no answers of kind {kind!r}: there are {', '.join((*_CHECKS, 'regex'))}")
        if (kind == "regex") != bool(pattern):
            raise UsageError("a judge of kind regex needs a pattern, and no other kind takes one")
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None
        if kind == "math":
            _math_verify()
        self.name, self._kind, self._column = name or kind, kind, column
        self.settings: Mapping[str, Any] = {"kind": kind, "column": column, "pattern": pattern}

    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        return [self._verdict(candidate) for candidate in candidates]

    def _verdict(self, candidate: Candidate) -> Verdict:
        if candidate.columns.get(self._column) is None:
            raise UsageError(
                f"judge {self.name} needs the right answer in the column {self._column!r} of each prompt's row; "
                f"this one has {', '.join(candidate.columns) or 'no columns'}. Name the file of prompts that has it"
            )
        answer = str(candidate.columns[self._column])
        if self._kind == "regex":
            return Verdict(float(self._matches(candidate.completion, answer)))
        return Verdict(float(_CHECKS[self._kind](candidate.completion, answer)))

    def _matches(self, completion: str, answer: str) -> bool:
        matches = list(self._pattern.finditer(completion))
        if not matches:
            return False
        text = matches[-1].group(1 if self._pattern.groups else 0) or ""
        return text.strip() == answer.strip()


def _same_text(completion: str, answer: str) -> bool:
    return completion.strip() == answer.strip()


def _same_number(completion: str, answer: str) -> bool:
    right = final_number(answer)
    if right is None:
        raise UsageError(f"the right answer {answer[:80]!r} is not a number; use exact, regex or math")
    return final_number(completion) == right


def _same_expression(completion: str, answer: str) -> bool:
    library = _math_verify()
    # Its own time limits use signals, which work in the main thread alone.
    limit = {"parsing_timeout": None}
    right, given = (library.parse(text, **limit) for text in (answer, completion))
    return bool(library.verify(right, given, timeout_seconds=None))


def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise UsageError(
            f"judges of kind math need math-verify ({error}): pip install 'prefopt-trainer[evaluation]'"
        ) from error


_CHECKS = {"exact": _same_text, "number": _same_number, "math": _same_expression}
