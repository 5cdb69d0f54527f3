"""Rules about the training pairs themselves: the same tokens twice, the opposite of another pair, nothing to prefer.

`prefopt check` says it of a file before training; these read the token ids that a trainer has, whoever made them. A
hundred thousand rows take under a second. Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from prefopt.analysis.health.finding import Finding, first_rows

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
AT_ONCE = 10_000
"""Rows that are read into memory together."""
REPEATED_SHARE = 0.01
"""A pair in a hundred: fewer do not change what is learned."""
OPPOSED_SHARE = 0.01
"""From a pair in a hundred on, contradictions are a warning and not only a note."""


def examine_rows(rows: Any) -> list[Finding]:
    """What the pairs of a training set show before any step; nothing for streams and for rows that are not pairs.

    Args:
        rows: a `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `rejected_ids`. Findings number its rows from 0.
    """
    if not hasattr(rows, "__len__") or not set(COLUMNS) <= set(getattr(rows, "column_names", None) or ()):
        return []
    count, seen = len(rows), set()
    same, repeated, opposed = [], [], []
    for row, (prompt, chosen, rejected) in enumerate(zip(*(_digests(rows, name) for name in COLUMNS), strict=True)):
        if chosen == rejected:
            same.append(row)
            continue
        pair = hash((prompt, chosen, rejected))
        if pair in seen:
            repeated.append(row)
        elif hash((prompt, rejected, chosen)) in seen:
            opposed.append(row)
        seen.add(pair)
    return [
        finding
        for finding in (_same(same, count), _opposed(opposed, count), _repeated(repeated, count))
        if finding is not None
    ]


def _digests(rows: Any, column: str) -> Iterator[int]:
    """A number for each list of token ids, equal for equal lists."""
    table = rows.select_columns([column]).with_format("arrow")
    for start in range(0, len(table), AT_ONCE):
        lists = table[start : start + AT_ONCE].column(column).combine_chunks()
        width = lists.values.type.bit_width // 8
        values, offsets = lists.flatten().to_numpy().tobytes(), lists.offsets.to_pylist()
        for begin, end in pairwise(offset - offsets[0] for offset in offsets):
            yield hash(values[begin * width : end * width])


def _same(rows: list[int], count: int) -> Finding | None:
    if not rows:
        return None
    text = (
        f"{len(rows)} of {count} training pairs have the same tokens on both sides, so they teach no preference: "
        f"{first_rows(rows)}"
    )
    return Finding("dead_pairs", "warning", 0, text, "delete these rows", tuple(rows))


def _opposed(rows: list[int], count: int) -> Finding | None:
    if not rows:
        return None
    level = "warning" if len(rows) >= OPPOSED_SHARE * count else "note"
    text = (
        f"{len(rows)} of {count} training pairs prefer the opposite of an earlier pair, so that the two cancel out: "
        f"{first_rows(rows)}"
    )
    remedy = 'keep one of the two; or, if people disagree, a loss for noisy labels: --loss "dpo(label_smoothing=0.1)"'
    return Finding("opposed_pairs", level, 0, text, remedy, tuple(rows))


def _repeated(rows: list[int], count: int) -> Finding | None:
    if len(rows) < REPEATED_SHARE * count or not rows:
        return None
    text = f"{len(rows)} of {count} training pairs repeat an earlier one, so they count twice: {first_rows(rows)}"
    return Finding("repeated_pairs", "note", 0, text, "delete the repetitions if not intended", tuple(rows))
