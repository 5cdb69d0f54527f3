"""What changed between two texts, word by word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

Part = tuple[str, str]
"""`same`, `added` or `removed`, and the text."""

_COMPARED = 20_000
"""Pairs of words. The search takes long on more, above all where one word repeats, as in degenerate answers."""


def changed_words(old: str, new: str) -> list[Part]:
    """The parts of both texts in reading order. Joined without the removed parts they are the new text.

    Of texts that differ in long stretches, such a stretch is one change.
    """
    before, after = (re.findall(r"\s+|\S+\s*", text) for text in (old, new))
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    middle = _middle(before[start : len(before) - end], after[start : len(after) - end])
    parts = [("same", "".join(after[:start])), *middle, ("same", "".join(after[len(after) - end :]))]
    return [(kind, text) for kind, text in parts if text]


def _alike(before: Sequence[str], after: Sequence[str]) -> int:
    """How many words both begin with."""
    pairs = zip(before, after, strict=False)
    return next((place for place, (old, new) in enumerate(pairs) if old != new), min(len(before), len(after)))


def _middle(before: Sequence[str], after: Sequence[str]) -> list[Part]:
    if len(before) * len(after) > _COMPARED:
        return [("removed", "".join(before)), ("added", "".join(after))]
    parts = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(("same", "".join(after[j1:j2])))
        else:
            parts += [("removed", "".join(before[i1:i2])), ("added", "".join(after[j1:j2]))]
    return parts
