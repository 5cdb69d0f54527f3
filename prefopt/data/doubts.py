"""Doubts about a dataset from its first rows, although each row can be trained on: lines, not errors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.formats import IMPLICIT
from prefopt.data.rankings import is_number

Row = Mapping[str, Any]

_TEXTS = ("prompt", "chosen", "rejected")
_NEARLY_ALL = 0.9
_SCORE = re.compile(r"(\w+[_.-])?(scores?|ratings?|rewards?)([_.-]\w+)?", re.IGNORECASE)


def doubts(rows: Sequence[Row], mapped: Collection[str] = ()) -> Iterator[str]:
    """One line for each doubt that nearly all of `rows` raise; `mapped`: our columns that the user chose."""
    scores = "" if "chosen" in mapped else _scores_against(rows)
    for line in (_repeated_prompts(rows), _lists_as_text(rows), scores):
        if line:
            yield line


def _repeated_prompts(rows: Sequence[Row]) -> str:
    """Plain completions that begin with their prompt."""
    texts = [[str(row[name]) for name in _TEXTS] for row in rows if all(isinstance(row.get(n), str) for n in _TEXTS)]
    pairs = [row for row in texts if row[0].strip()]
    repeated = [row for row in pairs if all(text.startswith(row[0].strip()) for text in row[1:])]
    if not repeated or len(repeated) < _NEARLY_ALL * len(pairs):
        return ""
    return (
        f"In {len(repeated)} of the first {len(pairs)} rows 'chosen' and 'rejected' begin with the prompt, which is "
        "trained as a part of the answer. If they are prompt and answer, pass --columns unused=prompt --format "
        f"{IMPLICIT}."
    )


def _lists_as_text(rows: Sequence[Row]) -> str:
    """Prompts that are the JSON text of lists of texts; answers may be JSON."""
    prompts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    listed = [text for text in prompts if _is_list_of_texts(text)]
    if not listed or len(listed) < _NEARLY_ALL * len(prompts):
        return ""
    return (
        f"{len(listed)} of the first {len(prompts)} prompts are JSON lists of texts ({listed[0][:60]!r}), and are "
        "trained as they are written, brackets and all. Write the text itself, or messages."
    )


def _is_list_of_texts(text: str) -> bool:
    if not text.lstrip().startswith('["'):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _scores_against(rows: Sequence[Row]) -> str:
    """Scores that rate the rejected side higher."""
    names = list(rows[0]) if rows else []
    for chosen in (name for name in names if "chosen" in name and _SCORE.fullmatch(name)):
        rejected = chosen.replace("chosen", "rejected")
        both = [row for row in rows if all(is_number(row.get(name)) for name in (chosen, rejected))]
        against = [row for row in both if row[chosen] < row[rejected]]
        if against and len(against) >= _NEARLY_ALL * len(both):
            return (
                f"{chosen!r} is below {rejected!r} in {len(against)} of the first {len(both)} rows. If more is "
                "better, the two sides are swapped: pass --columns chosen=rejected rejected=chosen."
            )
    return ""
