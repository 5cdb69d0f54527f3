"""What changed between two texts, word by word."""

from __future__ import annotations

import difflib
import re

Part = tuple[str, str]
"""`same`, `added` or `removed`, and the text."""

_LONGEST = 4000
"""Characters of a text that are compared: longer ones take too long."""


def changed_words(old: str, new: str) -> list[Part]:
    """The parts of both texts in reading order. Joined without the removed parts they are the new text."""
    if len(old) > _LONGEST or len(new) > _LONGEST:
        return [("removed", old), ("added", new)] if old != new else [("same", new)]
    before, after = (re.findall(r"\s+|[^\s]+", text) for text in (old, new))
    parts: list[Part] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(("same", "".join(after[j1:j2])))
            continue
        if i2 > i1:
            parts.append(("removed", "".join(before[i1:i2])))
        if j2 > j1:
            parts.append(("added", "".join(after[j1:j2])))
    return parts
