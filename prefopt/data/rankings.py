"""Data that ranks, rates or compares answers, turned into pairs or groups: what `prefopt pair` does.

`ranking_advice.py` recognises such data and writes the command. Ties make no pair and are counted. Equal answers of a
row count once, with their mean number.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from prefopt.data.errors import DataError
from prefopt.data.messages import writing
from prefopt.data.paths import parsed, value_at
from prefopt.safety.files import write_whole

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pairing:
    """How rows become pairs: two answers and a winner, or a list of answers with ranks or scores.

    Attributes:
        prompt: the column with the prompt; None if the answers are whole conversations.
        first, second: the columns of the two answers.
        winner: the column that says which of the two is better, or the place (from 0) of the best of a list.
        first_wins, second_wins: its values, as text, that mean one of them; every other value is a tie.
        answers: the column that lists the answers, texts or objects; or that holds one answer, if the answers
            to one prompt are in separate rows.
        text: the field of an object in `answers` that holds its text.
        rank, score: the field of an object, or the column with a list of numbers, that orders the answers; or the
            columns of the first and the second, with a comma. The lowest rank or the highest score is the best.
        every: all pairs of a row, not only its best and worst answer.
        lists: no pairs, but all answers of a row with their scores, as groups.
    """

    prompt: str | None = None
    first: str | None = None
    second: str | None = None
    winner: str | None = None
    first_wins: tuple[str, ...] = ()
    second_wins: tuple[str, ...] = ()
    answers: str | None = None
    text: str | None = None
    rank: str | None = None
    score: str | None = None
    every: bool = False
    lists: bool = False


def write_pairs(rows: Iterable[Row], how: Pairing, path: Path) -> Counter[str]:
    """Writes the pairs of `rows` to a JSONL file and counts them; writes nothing if there are none."""
    _check(how)
    found: Counter[str] = Counter()

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as stream:
            for made in pair(rows, how, found):
                stream.write(json.dumps(made, ensure_ascii=False) + "\n")
        if not found["pairs"]:
            raise DataError(
                f"None of the {found['rows']} rows makes a pair: each is a tie, or lacks an answer or its number. "
                "Look at the values of the columns, and at the options that name them."
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    return found


def _check(how: Pairing) -> None:
    two = (how.first, how.second)
    if bool(how.answers) == any(two):
        raise DataError("Pairs come from --first, --second and --winner, or from --answers: pass one of the two.")
    if how.answers and [how.rank, how.score, how.winner].count(None) != 2:
        raise DataError(
            "--answers needs what orders them: --rank (the lowest is the best), --score (the highest) or --winner "
            "(the place of the best, from 0)."
        )
    if how.lists and (how.every or not (how.rank or how.score) or not how.answers):
        raise DataError(
            "--lists writes all answers of a row with their scores: it needs --answers with --score or --rank, and "
            "excludes --every."
        )
    if how.answers or (all(two) and "," in (how.rank or how.score or "")):
        return
    if not all((*two, how.winner, how.first_wins, how.second_wins)):
        raise DataError(
            "Two answers need all of --first, --second, --winner, --first-wins and --second-wins; or --first, "
            "--second and two columns with a comma, --score A,B or --rank A,B."
        )


def pair(rows: Iterable[Row], how: Pairing, found: Counter[str]) -> Iterator[dict[str, Any]]:
    """Pairs of `rows`; `found` counts `rows`, `pairs` and `rows without a pair`: ties, or a missing answer."""
    made = _of_two if how.first else _of_list
    grouped: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        found["rows"] += 1
        missing = [name for name in (how.prompt, how.first, how.second, how.winner, how.answers) if name]
        if absent := [name for name in missing if name.partition(".")[0] not in row]:
            raise DataError(f"Row {number} has no column {absent[0]!r}. Its columns: {', '.join(row)}.")
        prompt = {"prompt": value_at(row, how.prompt)} if how.prompt else {}
        try:
            if how.answers and not _lists_answers(row, how):
                _add(grouped, prompt, row, how)
                continue
            pairs = [{**prompt, **sides} for sides in made(row, how)]
        except DataError as error:
            raise DataError(f"Row {number} {error}") from error
        found["pairs"] += len(pairs)
        found["rows without a pair"] += not pairs
        yield from pairs
    for group in grouped.values():
        pairs = [{**group["prompt"], **sides} for sides in made(group, how)]
        found["pairs"] += len(pairs)
        found["rows without a pair"] += 0 if pairs else len(group[str(how.answers)])
        yield from pairs


def _add(grouped: dict[str, dict[str, Any]], prompt: dict[str, Any], row: Row, how: Pairing) -> None:
    """One row's answer to those of its prompt."""
    answers, key = str(how.answers), str(how.rank or how.score)
    if key.partition(".")[0] not in row:
        raise DataError(f"has no column {key!r}. Its columns: {', '.join(row)}.")
    group = grouped.setdefault(json.dumps(prompt, sort_keys=True), {"prompt": prompt, answers: [], key: []})
    group[answers].append(value_at(row, answers))
    group[key].append(value_at(row, key))


def _lists_answers(row: Row, how: Pairing) -> bool:
    """Whether the row has all answers of its prompt, in a list or the JSON text of one; an answer may be JSON too."""
    answers, key = value_at(row, str(how.answers)), str(how.rank or how.score)
    if not isinstance(answers, str):
        return True
    in_answers = key.partition(".")[0] not in row
    return isinstance(parsed(answers), list) and (in_answers or isinstance(parsed(value_at(row, key)), list))


def _of_two(row: Row, how: Pairing) -> Iterator[dict[str, Any]]:
    first, second = value_at(row, str(how.first)), value_at(row, str(how.second))
    if how.winner is None:
        names = [name.strip() for name in str(how.rank or how.score).split(",", 1)]
        if absent := [name for name in names if name.partition(".")[0] not in row]:
            raise DataError(f"has no column {absent[0]!r}. Its columns: {', '.join(row)}.")
        answers = [(number_of(value_at(row, name)), text) for name, text in zip(names, (first, second), strict=True)]
        yield from _best_and_worst(_ordered(answers, how), how)
        return
    winner = word_of(value_at(row, how.winner))
    if not first or not second or first == second:
        return
    if winner in how.first_wins:
        yield {"chosen": first, "rejected": second}
    elif winner in how.second_wins:
        yield {"chosen": second, "rejected": first}


def _ordered(answers: Iterable[tuple[float | None, Any]], how: Pairing) -> list[tuple[float, Any]]:
    """The answers that have a text and a number, the best first; equal ones once, with the mean of their numbers."""
    numbers: dict[str, tuple[Any, list[float]]] = {}
    for number, text in answers:
        if number is not None and text:
            numbers.setdefault(json.dumps(text, sort_keys=True), (text, []))[1].append(number)
    means = [(math.fsum(of_text) / len(of_text), text) for text, of_text in numbers.values()]
    return sorted(means, key=lambda answer: answer[0], reverse=not how.rank)


def _best_and_worst(ordered: Sequence[tuple[float, Any]], how: Pairing) -> Iterator[dict[str, Any]]:
    """A pair, or all pairs; scores are kept for losses that read them, ranks are not."""
    pairs = itertools.combinations(ordered, 2) if how.every else [(ordered[0], ordered[-1])] if ordered else []
    for (better, chosen), (worse, rejected) in pairs:
        if better != worse:
            scores = {"chosen_score": better, "rejected_score": worse} if how.score else {}
            yield {"chosen": chosen, "rejected": rejected, **scores}


def _of_list(row: Row, how: Pairing) -> Iterator[dict[str, Any]]:
    answers, key = parsed(value_at(row, str(how.answers))) or [], str(how.rank or how.score)
    if not isinstance(answers, list):
        raise DataError(f"has no list and no text in {how.answers!r}, but {answers!r:.60}.")
    texts = [_text_of(answer, how) for answer in answers]
    if how.winner is not None:
        best = number_of(value_at(row, how.winner))
        order: Any = [float(place == best) for place in range(len(texts))]
    elif key.partition(".")[0] in row:
        order = parsed(value_at(row, key)) or []
    else:
        order = [_field_of(answer, key) for answer in answers]
    if not isinstance(order, list) or (order and len(order) != len(texts)):
        raise DataError(
            f"has {len(texts)} answers in {how.answers!r}, and in {key!r} is {order!r:.60}, not one of each."
        )
    ordered = _ordered(zip(map(number_of, order), texts, strict=False), how)
    yield from _whole(ordered, bool(how.rank)) if how.lists else _best_and_worst(ordered, how)


def _text_of(answer: Any, how: Pairing) -> Any:
    """The text of an answer, or its messages."""
    if how.text is not None and isinstance(answer, Mapping):
        return _field_of(answer, how.text)
    if isinstance(answer, Mapping) and not writing(answer):
        raise DataError(f"has answers with the fields {', '.join(answer)}: name the one that is the text with --text.")
    return answer


def _field_of(answer: Any, path: str) -> Any:
    if not isinstance(answer, Mapping) or path.partition(".")[0] not in answer:
        fields = f"the fields {', '.join(answer)}" if isinstance(answer, Mapping) else "no fields"
        raise DataError(f"has neither a column {path!r} nor an answer with it: its answers have {fields}.")
    return value_at(answer, path)


def _whole(ordered: Sequence[tuple[float, Any]], ranked: bool) -> Iterator[dict[str, Any]]:
    """The group of (place, answer), the best first; none if ranks, which are no scores, are equal."""
    places = [place for place, _ in ordered]
    if len(ordered) < 2 or (ranked and len(set(places)) < len(places)):
        return
    yield {
        "completions": [text for _, text in ordered],
        **({} if ranked else {"scores": places}),
    }


def word_of(value: Any) -> str:
    """A verdict as text for the command line; 1.0 is 1, since a column with a null holds floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_of(value: Any) -> float | None:
    """A rank or a score, also if it is true, false or text (`"4"`); None for `N/A`, NaN and others."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
