"""Groups: several completions of one prompt in one row, with a score each, or in order from the best to the worst.

The checks and the tokenizer work on one text after the other. `spread` gives each completion of a group a name of its
own, so that the same code serves pairs and groups. It imports `messages` alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.messages import same_texts

Row = Mapping[str, Any]

COMPLETIONS, SCORES, WINS = "completions", "scores", "win_probabilities"
SIDES = (COMPLETIONS,)
"""The columns of completions, as pairs have ("chosen", "rejected")."""

_AGREEMENT = 0.01
"""How far the probability that one completion beats another may be from 1 less that of the reverse."""

MAX_SCORE = 1e30
"""Scores are below this, and above its negative."""


def is_group(sides: Sequence[str]) -> bool:
    return tuple(sides) == SIDES


def spread(row: Row, sides: Sequence[str]) -> tuple[Row, tuple[str, ...]]:
    """A row in which each completion has a column, and the names of these columns; unchanged if it is no group."""
    if not is_group(sides):
        return row, tuple(sides)
    texts = row[COMPLETIONS] if isinstance(row.get(COMPLETIONS), list) else []
    columns = {f"{COMPLETIONS}[{place}]": text for place, text in enumerate(texts)}
    return {**row, **columns}, tuple(columns)


def column_of(side: str) -> str:
    """The column of the row that holds a completion which `spread` names."""
    return side.partition("[")[0]


def texts_problems(completions: Sequence[Any]) -> Iterator[str]:
    """Problems of how the completions of a group compare; none of them is null."""
    if len(completions) < 2:
        yield "fewer than two completions"
        return
    equal = [same_texts(*pair) for pair in itertools.combinations(completions, 2)]
    if all(equal):
        yield "all completions are equal"
    elif any(equal):
        yield "equal completions"


def scores_problems(row: Row) -> Iterator[str]:
    """Problems of the scores of a group; its completions may be texts or token ids."""
    scores = row.get(SCORES)
    completions = row[COMPLETIONS] if COMPLETIONS in row else row.get(f"{COMPLETIONS}_ids")
    if not isinstance(scores, list) or not all(map(_is_score, scores)):
        yield "bad scores"
    elif isinstance(completions, list) and len(scores) != len(completions):
        yield "scores do not fit"
    elif len(scores) > 1 and len(set(scores)) == 1:
        yield "all scores are equal"


def mean_wins(matrix: Any) -> list[float] | None:
    """Each completion's mean probability to win against the others of its group, or None for another value.

    Args:
        matrix: row i, column j: the probability that completion i is better than j. The diagonal does not count.
    """
    if not isinstance(matrix, list) or not all(isinstance(row, list) and len(row) == len(matrix) for row in matrix):
        return None
    others = [(i, j) for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
    if not others or not all(_is_score(matrix[i][j]) and 0 <= matrix[i][j] <= 1 for i, j in others):
        return None
    if any(abs(matrix[i][j] + matrix[j][i] - 1) > _AGREEMENT for i, j in others):
        return None
    return [sum(row[j] for j in range(len(matrix)) if j != i) / (len(matrix) - 1) for i, row in enumerate(matrix)]


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < MAX_SCORE
