"""Data that ranks, rates or compares answers and has no pairs yet: recognised, and turned into pairs on request.

`pairing_advice` recognises such data by columns and values and writes the `prefopt pair` command for it; `pair` does
what that command says. Ties make no pair and are counted.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data.errors import DataError
from prefopt.data.messages import plain_text
from prefopt.files import write_whole

Row = Mapping[str, Any]

_SIDE = re.compile(r"(.*?)[_ ]?(a|b|0|1|2|first|second|left|right)", re.IGNORECASE)
_OTHER = {"b": "a", "second": "first", "right": "left"}
_WINNER = re.compile(
    r"winner|labels?|(overall_|human_)?preference|preferred|choice|(better|safer)(_(response|answer))?(_id)?"
    r"|judg(e)?ment|verdict|vote",
    re.IGNORECASE,
)
_SCORE = re.compile(r"(\w+_)?(ranks?|ranking|scores?|ratings?|rewards?)", re.IGNORECASE)
_TEXT = ("answer", "response", "text", "content", "completion", "output", "value", "message")
_PROMPTS = ("prompt", "question", "instruction", "query", "history", "input", "context", "messages", "conversations")


@dataclass(frozen=True)
class Pairing:
    """How rows become pairs: two answers and a winner, or a list of answers with ranks or scores.

    Attributes:
        prompt: the column with the prompt; None where the answers are whole conversations.
        first, second: the columns of the two answers.
        winner: the column that says which of the two is better.
        first_wins, second_wins: its values, as text, that mean one of them; every other value is a tie.
        answers: the column that lists the answers, texts or objects.
        text: the field of an object in `answers` that holds its text.
        rank, score: the field of an object, or the column with a list of numbers, that orders the answers; the lowest
            rank or the highest score is the best.
        every: all pairs of a row in place of its best and worst answer.
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


def write_pairs(rows: Iterable[Row], how: Pairing, path: Path) -> Counter[str]:
    """Writes the pairs of `rows` to a JSONL file and counts them; nothing is written where there are none."""
    _check(how)
    found: Counter[str] = Counter()

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8") as stream:
            for made in pair(rows, how, found):
                stream.write(json.dumps(made, ensure_ascii=False) + "\n")
        if not found["pairs"]:
            raise DataError(
                f"None of the {found['rows']} rows makes a pair: every one is a tie, or lacks an answer. Look at the "
                "values of the columns, and at the options that name them."
            )

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    return found


def _check(how: Pairing) -> None:
    two = (how.first, how.second, how.winner)
    if bool(how.answers) == any(two):
        raise DataError("Pairs come from --first, --second and --winner, or from --answers: give one of the two.")
    if how.answers and bool(how.rank) == bool(how.score):
        raise DataError("--answers needs what orders them: --rank (the lowest is the best) or --score (the highest).")
    if not how.answers and not all((*two, how.first_wins, how.second_wins)):
        raise DataError("Two answers need all of --first, --second, --winner, --first-wins and --second-wins.")


def pair(rows: Iterable[Row], how: Pairing, found: Counter[str]) -> Iterator[dict[str, Any]]:
    """Pairs of `rows`; `found` counts `rows`, `pairs` and `rows without a pair`: ties, or a missing answer."""
    made = _of_two if how.first else _of_list
    for number, row in enumerate(rows):
        found["rows"] += 1
        missing = [name for name in (how.prompt, how.first, how.second, how.winner, how.answers) if name]
        if absent := [name for name in missing if name not in row]:
            raise DataError(f"Row {number} has no column {absent[0]!r}. Its columns: {', '.join(row)}.")
        prompt = {"prompt": row[how.prompt]} if how.prompt else {}
        pairs = [{**prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in made(row, how)]
        found["pairs"] += len(pairs)
        found["rows without a pair"] += not pairs
        yield from pairs


def _of_two(row: Row, how: Pairing) -> Iterator[tuple[Any, Any]]:
    first, second, winner = row[str(how.first)], row[str(how.second)], _word(row[str(how.winner)])
    if first and second and winner in how.first_wins:
        yield first, second
    elif first and second and winner in how.second_wins:
        yield second, first


def _of_list(row: Row, how: Pairing) -> Iterator[tuple[Any, Any]]:
    answers, key = row[str(how.answers)] or [], str(how.rank or how.score)
    order = row[key] if key in row else [answer.get(key) for answer in answers]
    texts = [answer.get(how.text) if isinstance(answer, Mapping) else answer for answer in answers]
    sign = 1 if how.rank else -1
    ordered = sorted(
        ((sign * float(value), text) for value, text in zip(order, texts, strict=True) if _is_number(value) and text),
        key=lambda item: item[0],
    )
    for (better, chosen), (worse, rejected) in (
        itertools.combinations(ordered, 2) if how.every else [(ordered[0], ordered[-1])] if ordered else []
    ):
        if better < worse:
            yield chosen, rejected


def pairing_advice(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The command that pairs rows with two answers and a verdict, or with a list of ranked answers; "" for others."""
    return _two_answers(names, rows) or _ranked_list(names, rows) or _ranked_texts(names, rows)


def _two_answers(names: Sequence[str], rows: Sequence[Row]) -> str:
    sides: dict[str, list[str]] = {}
    for name in names:
        match = _SIDE.fullmatch(name)
        if match and match[1] and any(isinstance(row.get(name), str | list) for row in rows):
            sides.setdefault(match[1], []).append(name)
    # `model_a` and `model_b` stand beside `conversation_a` and `conversation_b`: the longer texts are the answers.
    pairs = [found for found in sides.values() if len(found) == 2]
    winner = next((name for name in names if _WINNER.fullmatch(name)), None)
    if not pairs or winner is None:
        return ""
    first, second = max(pairs, key=lambda pair: sum(len(plain_text(row.get(name))) for row in rows for name in pair))
    whole = any(isinstance(row.get(first), list) for row in rows)
    values = sorted({_word(row.get(winner)) for row in rows})
    wins = _wins(first, winner, values)
    meaning = (
        f"Check that this is what {winner!r} means; every other value is a tie."
        if wins
        else f"Put the values of {winner!r} (here {', '.join(values[:6])}) in the place of the dots, with commas."
    )
    first_wins, second_wins = wins or ("...", "...")
    prompt = None if whole else _prompt_of(names)
    return (
        f"These rows hold two answers ({first}, {second}) and which is better ({winner}): they have to be paired "
        f"first. Run: prefopt pair DATA --out pairs.jsonl{_option('prompt', prompt)} --first {first} --second "
        f"{second} --winner {winner} --first-wins={first_wins} --second-wins={second_wins}. {meaning}"
    )


def _wins(first: str, winner: str, values: Sequence[str]) -> tuple[str, str] | None:
    """The values that mean the first and the second answer, where names or published sets say so."""
    ends = {value: match[2].lower() for value in values if (match := _SIDE.fullmatch(value))}
    left = [value for value, end in ends.items() if end in _OTHER.values()]
    right = [value for value, end in ends.items() if end in _OTHER]
    if left or right:
        left = left or [_other_side(value) for value in right]
        return ",".join(left), ",".join(right or map(_other_side, left))
    if winner == "overall_preference":  # HelpSteer3: negative for the first response
        return "-3,-2,-1", "1,2,3"
    if winner.endswith("_id") and first.endswith("_0"):  # PKU-SafeRLHF: the response's number
        return "0", "1"
    if winner == "labels" and first.lower().startswith("human_ref"):  # SHP: 1 for the first
        return "1", "0"
    return None


def _other_side(value: str) -> str:
    """`model_b` for `model_a`: the rows that were looked at may not hold both."""
    match = _SIDE.fullmatch(value)
    assert match is not None
    end = {**_OTHER, **{first: second for second, first in _OTHER.items()}}[match[2].lower()]
    return value[: len(value) - len(match[2])] + (end.upper() if match[2].isupper() else end)


def _ranked_list(names: Sequence[str], rows: Sequence[Row]) -> str:
    for name in names:
        items = [item for row in rows if isinstance(row.get(name), list) for item in row[name]]
        if not items or not all(isinstance(item, dict) for item in items):
            continue
        fields = dict.fromkeys(field for item in items for field in item)
        text = next((field for field in _TEXT if isinstance(items[0].get(field), str)), None)
        score = next((field for field in fields if _SCORE.fullmatch(field) and _is_number(items[0].get(field))), None)
        if text and score:
            return _list_advice(names, name, score, text)
    return ""


def _ranked_texts(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Two lists, of texts and of numbers, of one length."""
    lists = {name: [row[name] for row in rows if isinstance(row.get(name), list)] for name in names}
    flat = {name: [item for value in values for item in value] for name, values in lists.items()}
    for score in (name for name in names if _SCORE.fullmatch(name) and flat[name]):
        for name in names:
            texts = bool(flat[name]) and all(isinstance(item, str) for item in flat[name])
            if texts and all(map(_is_number, flat[score])) and [*map(len, lists[name])] == [*map(len, lists[score])]:
                return _list_advice(names, name, score, None)
    return ""


def _list_advice(names: Sequence[str], answers: str, score: str, text: str | None) -> str:
    ranked = "rank" in score.lower()
    return (
        f"Column {answers!r} lists several answers and {score!r} orders them: they have to be paired first. Run: "
        f"prefopt pair DATA --out pairs.jsonl{_option('prompt', _prompt_of(names))} --answers {answers}"
        f"{_option('text', text)} --{'rank' if ranked else 'score'} {score}. It takes the best and the worst "
        f"answer of a row, the {'lowest rank' if ranked else 'highest score'} being the best; --every takes all pairs."
    )


def _option(name: str, value: str | None) -> str:
    return f" --{name} {value}" if value else ""


def _prompt_of(names: Sequence[str]) -> str | None:
    return next((name for name in _PROMPTS if name in names), None)


def _word(value: Any) -> str:
    """A verdict as it is written on the command line; 1.0 is 1, since a column with a null holds floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
