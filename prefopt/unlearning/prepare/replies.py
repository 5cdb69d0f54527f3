"""What a generator wrote, read by fixed rules: lines with labels, numbered lines, or one line.

These forms are what small models manage; JSON is not. Every line that is not in the form is returned as a fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_MARKS = r"[*_#>\s]*"
"""Markdown, which many models write around labels."""
_LABELLED = re.compile(
    rf"{_MARKS}(?:\d+[.)]\s*|[-•]\s+)?{_MARKS}(?P<label>question|answer|q|a)\s*\d*\s*{_MARKS}:(?P<text>.*)",
    re.IGNORECASE,
)
_NUMBERED = re.compile(rf"{_MARKS}(?P<label>\d+)\s*[.):](?P<text>.*)")
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}


@dataclass
class Parsed(Generic[T]):
    """What a reply holds.

    Attributes:
        items: in order.
        faults: what is wrong, and the text that it is about.
    """

    items: list[T] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def question_pairs(text: str, finished: bool = True) -> Parsed[tuple[str, str]]:
    """Questions and their answers: `Question: ...` and, in the next line with text, `Answer: ...`.

    Args:
        text: the reply.
        finished: False if it was cut, so that its last line may lack its end.
    """
    entries = _entries(text, finished, _LABELLED)
    parsed: Parsed[tuple[str, str]] = Parsed(faults=entries.faults)
    question = ""
    for label, words in entries.items:
        if not label or label[0].lower() == "q":
            if question:
                parsed.faults.append(("a question without an answer", question))
            question = words if label else ""
        elif question:
            parsed.items.append((question, words))
            question = ""
        else:
            parsed.faults.append(("an answer without a question", words))
    if question:
        parsed.faults.append(("a question without an answer", question))
    return parsed


def numbered(text: str, finished: bool = True) -> Parsed[str]:
    """The texts of numbered lines: `1. ...`; arguments as those of `question_pairs`."""
    entries = _entries(text, finished, _NUMBERED)
    return Parsed([words for label, words in entries.items if label], entries.faults)


def one_line(text: str, finished: bool = True) -> Parsed[str]:
    """The only line with text, without a label before it; arguments as those of `question_pairs`."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return Parsed()
    if not finished:
        return Parsed(faults=[("a line that was cut", lines[-1])])
    if len(lines) > 1:
        return Parsed(faults=[("more than one line", text.strip())])
    match = _LABELLED.fullmatch(lines[0])
    words = _clean(match["text"] if match else lines[0])
    return Parsed([words] if words else [])


def bare(line: str) -> str:
    """A line without its label or number."""
    match = _LABELLED.fullmatch(line) or _NUMBERED.fullmatch(line)
    return _clean(match["text"] if match else line)


def key(text: str) -> str:
    """What two texts share that differ only in case, spaces, or the marks around them."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'“”()")


def _entries(text: str, finished: bool, form: re.Pattern[str]) -> Parsed[tuple[str, str]]:
    """(label, text) of each line in the form.

    A line in no form directly after one spoils it, since a text that goes on would be read in part. So does an end
    that was cut. Both lose their label.
    """
    parsed: Parsed[tuple[str, str]] = Parsed()
    last_is_whole = True
    lines = text.splitlines()
    follows = False
    for number, line in enumerate(lines):
        match = form.fullmatch(line)
        if match is not None and (words := _clean(match["text"])):
            parsed.items.append((match["label"], words))
            follows = True
            last_is_whole = finished or number < len(lines) - 1 or text.endswith("\n")
        elif line.strip():
            parsed.faults.append(("a line that is not in the form asked for", line.strip()))
            if follows:
                parsed.faults.append(("a text that goes on in the next line", _spoiled(parsed)))
            follows = False
        else:
            follows = False
    if not last_is_whole:
        parsed.faults.append(("a line that was cut", _spoiled(parsed)))
    return parsed


def _spoiled(parsed: Parsed[tuple[str, str]]) -> str:
    """Take the label off the last item; its text."""
    _, text = parsed.items.pop()
    parsed.items.append(("", text))
    return text


def _clean(text: str) -> str:
    """Without Markdown's stars around it, and without quotation marks around the whole."""
    text = text.strip().strip("*_").strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text
