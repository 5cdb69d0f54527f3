"""Data that ranks, rates or compares answers and has no pairs yet: recognised, and turned into pairs on request.

`pairing_advice` recognises such data by columns and values and writes the `prefopt pair` command for it; `pair` does
what that command does. Ties make no pair and are counted. Equal answers of a row count once, with their mean number.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from prefopt.data.columns import is_metadata
from prefopt.data.errors import DataError
from prefopt.data.messages import plain_text, role, writing
from prefopt.data.paths import fields_of, parsed, value_at
from prefopt.safety.files import write_whole

Row = Mapping[str, Any]

_SIDE = re.compile(r"(.*?)[_ ]?(a|b|0|1|2|first|second|left|right)", re.IGNORECASE)
_OTHER = {"b": "a", "second": "first", "right": "left"}
_WINNER = re.compile(
    r"(\w+_)?(winner|labels?|preference|preferred|choice|judg(e)?ment|verdict|vote)(_(id|label|strength))?"
    r"|(better|safer)(_(response|answer))?(_id)?",
    re.IGNORECASE,
)
_SCORE = re.compile(r"(\w+_)?(ranks?|ranking|scores?|ratings?|rewards?)", re.IGNORECASE)
_VERDICTS = re.compile(r"labels|(is_)?correct(ness)?|advantages?|preferences?|wins|votes", re.IGNORECASE)
_QUALITY = re.compile(
    r"(is_)?(helpful(ness)?|correct(ness)?|good(ness)?|quality|harmless(ness)?|honesty|truthful(ness)?|coherence|overall\w*"
    r"|preferred|preference|(up_?)?votes?|likes?|stars?|points|grades?|elo|win_?rate|accuracy|utility)",
    re.IGNORECASE,
)
"""Names of numbers that are higher for better answers; those of lengths, turns or losses are not among them."""
_RANK = re.compile(r"(^|.*_)(ranks?|ranking)([_ ]?(a|b|0|1|2|first|second|left|right))?", re.IGNORECASE)
_TEXT = ("answer", "response", "text", "content", "completion", "output", "value", "message")
_PROMPTS = ("prompt", "question", "instruction", "query", "history", "input", "context", "messages", "conversations")


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
        answers = [(_number(value_at(row, name)), text) for name, text in zip(names, (first, second), strict=True)]
        yield from _best_and_worst(_ordered(answers, how), how)
        return
    winner = _word(value_at(row, how.winner))
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
        best = _number(value_at(row, how.winner))
        order: Any = [float(place == best) for place in range(len(texts))]
    elif key.partition(".")[0] in row:
        order = parsed(value_at(row, key)) or []
    else:
        order = [_field_of(answer, key) for answer in answers]
    if not isinstance(order, list) or (order and len(order) != len(texts)):
        raise DataError(
            f"has {len(texts)} answers in {how.answers!r}, and in {key!r} is {order!r:.60}, not one of each."
        )
    ordered = _ordered(zip(map(_number, order), texts, strict=False), how)
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


def pairing_advice(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The command that pairs rows with two answers and a verdict, or with a list of ranked answers; "" for others."""
    lists = [{name: parsed(value) for name, value in row.items()} for row in rows]
    return (
        _two_answers(names, rows)
        or _ranked_list(names, lists)
        or _ranked_texts(names, lists)
        or _ranked_rows(names, rows)
    )


def _two_answers(names: Sequence[str], rows: Sequence[Row]) -> str:
    winner = next((name for name in names if _WINNER.fullmatch(name) and _are_verdicts(rows, name)), None)
    scores = next((found for found in _sides(names, rows, _is_numeric) if _is_of_scores(found[0])), None)
    pairs = [pair for pair in _sides(names, rows, _is_answer) if pair != scores]
    if not pairs or (winner is None and scores is None):
        return ""
    # There may be `model_a` and `model_b` besides `conversation_a` and `conversation_b`: the answers are longer.
    first, second = max(pairs, key=lambda pair: sum(len(plain_text(row.get(name))) for row in rows for name in pair))
    whole = any(
        isinstance(row.get(first), list) and role(row[first][0]) != "assistant" for row in rows if row.get(first)
    )
    prompt = None if whole else _prompt_of(names, rows)
    options = (_option(*option) for option in (("prompt", prompt), ("first", first), ("second", second)))
    start = f"prefopt pair DATA --out pairs.jsonl{''.join(options)}"
    if winner is None:
        assert scores is not None
        by, best = _meaning(scores[0])
        return (
            f"These rows hold two answers ({first}, {second}) and a {by} of each ({', '.join(scores)}): they have to "
            f"be paired first. Run: {start} --{by} {','.join(scores)}. The {best} is the better; equal ones make no "
            "pair."
        )
    values = sorted({_word(row.get(winner)) for row in rows})
    wins = _wins(first, second, winner, values)
    meaning = (
        f"Check that this is what {winner!r} means; every other value is a tie."
        if wins
        else f"Put the values of {winner!r} (here {', '.join(values[:6])}) in the place of the dots, with commas."
    )
    first_wins, second_wins = wins or ("...", "...")
    return (
        f"These rows hold two answers ({first}, {second}) and which is better ({winner}): they have to be paired "
        f"first. Run: {start}{_option('winner', winner)} --first-wins={shlex.quote(first_wins)} "
        f"--second-wins={shlex.quote(second_wins)}. {meaning}"
    )


def _sides(names: Sequence[str], rows: Sequence[Row], fits: Callable[[Any], bool]) -> list[list[str]]:
    """Pairs of columns whose names differ only in their side, and that hold such values."""
    sides: dict[str, list[str]] = {}
    for name in names:
        match = _SIDE.fullmatch(name)
        if match and match[1] and any(fits(row.get(name)) for row in rows):
            sides.setdefault(match[1], []).append(name)
    return [found for found in sides.values() if len(found) == 2]


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | list)


def _is_numeric(value: Any) -> bool:
    return _number(value) is not None


def _is_of_scores(name: str) -> bool:
    match = _SIDE.fullmatch(name)
    return match is not None and bool(_SCORE.fullmatch(match[1]) or match[1].startswith("winner"))


def _are_verdicts(rows: Sequence[Row], name: str) -> bool:
    return all(row.get(name) is None or isinstance(row.get(name), str | int | float) for row in rows)


def _wins(first: str, second: str, winner: str, values: Sequence[str]) -> tuple[str, str] | None:
    """The values that mean the first and the second answer, if names or published sets define them."""
    if {first, second} & set(values):
        return first, second
    ends = {value: match[2].lower() for value in values if (match := _SIDE.fullmatch(value))}
    left = [value for value, end in ends.items() if end in _OTHER.values()]
    right = [value for value, end in ends.items() if end in _OTHER]
    if left or right:
        left = left or [_other_side(value) for value in right]
        return ",".join(left), ",".join(right or map(_other_side, left))
    if winner in ("overall_preference", "preference_strength"):  # HelpSteer2, 3: negative for the first response
        return "-3,-2,-1", "1,2,3"
    if winner.endswith("_id") and first.endswith("_0"):  # PKU-SafeRLHF: the response's number
        return "0", "1"
    if winner == "labels" and first.lower().startswith("human_ref"):  # SHP: 1 for the first
        return "1", "0"
    return None


def _other_side(value: str) -> str:
    """`model_b` for `model_a`: the first rows may not have both."""
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
        text = next((field for field in _TEXT if writing(items[0].get(field))), None)
        score = next(
            (
                field
                for field in fields
                if _SCORE.fullmatch(field) and any(_number(item.get(field)) is not None for item in items)
            ),
            None,
        )
        if text and score:
            return _list_advice(names, rows, name, score, text)
        winner = next(
            (n for n in names if _WINNER.fullmatch(n) and all(type(row.get(n)) is int for row in rows)), None
        )
        if text and winner:
            return (
                f"Column {name!r} lists several answers and {winner!r} is the place of the best: they have to be "
                f"paired first. Run: prefopt pair DATA --out pairs.jsonl{_option('prompt', _prompt_of(names, rows))} "
                f"--answers {name} --text {text} --winner {winner}. Check that places count from 0."
            )
    return ""


def _ranked_rows(names: Sequence[str], rows: Sequence[Row]) -> str:
    """One answer and its scores per row, several rows per prompt."""
    prompt = _prompt_of(names, rows)
    answer = next((name for name in _TEXT if name in names and name != prompt), None)
    numbers = [name for name in names if rows and all(is_number(row.get(name)) for row in rows)]
    known = next((n for of in (_SCORE, _QUALITY) for n in numbers if of.fullmatch(n)), None)
    numbers = [name for name in numbers if not is_metadata(name)]
    score = known or ("NAME" if numbers else None)
    if not (prompt and answer and score and all(isinstance(row.get(answer), str) for row in rows)):
        return ""
    if len({str(value_at(row, prompt)) for row in rows}) == len(rows):
        return ""
    by, best = _meaning(score)
    options = (_option(*option) for option in (("prompt", prompt), ("answers", answer), (by, score)))
    asked = "" if known else f"Put the column that orders them ({', '.join(numbers[:10])}) in the place of NAME. "
    return (
        f"Each row holds one answer ({answer}){f' and its {known!r}' if known else ''}, and prompts have several "
        f"rows: they have to be paired first. Run: prefopt pair DATA --out pairs.jsonl{''.join(options)}. {asked}It "
        f"takes the best and the worst answer of a prompt, the {best} being the best"
        f"{'' if known else ' (with --rank NAME the lowest)'}; --every takes all pairs."
    )


def _ranked_texts(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Two lists, of texts and of numbers, of one length."""
    lists = {name: [row[name] for row in rows if isinstance(row.get(name), list)] for name in names}
    flat = {name: [item for value in values for item in value] for name, values in lists.items()}
    for score in (name for name in names if _SCORE.fullmatch(name) and flat[name]):
        for name in names:
            texts = bool(flat[name]) and all(isinstance(item, str) for item in flat[name])
            if (
                texts
                and any(_number(value) is not None for value in flat[score])
                and [*map(len, lists[name])] == [*map(len, lists[score])]
            ):
                return _list_advice(names, rows, name, score, None)
    return ""


def unread_order(rows: Sequence[Row]) -> str:
    """That a column has a number for each of the `completions`, which would be read as in order; "" if none has."""
    for name in rows[0] if rows else ():
        both = [(row.get("completions"), row[name]) for row in rows if row.get(name) is not None]
        fit = [isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in both]
        if not (_SCORE.fullmatch(name) or _VERDICTS.fullmatch(name)) or not fit or not all(fit):
            continue
        if any(_number(value) is not None for _, values in both for value in values):
            by, best = _meaning(name)
            return (
                f"Column {name!r} has a number for each of the 'completions', and without 'scores' these would "
                f"be taken as in order, the best first. If the {best} is the best, run: prefopt pair DATA --out "
                f"groups.jsonl --prompt prompt --answers completions --{by} {name} --lists. If the 'completions' are "
                f"the steps of one answer, they are no preferences. If they are in order: --columns unused={name}."
            )
    return ""


def _list_advice(names: Sequence[str], rows: Sequence[Row], answers: str, score: str, text: str | None) -> str:
    by, best = _meaning(score)
    order = by == "rank" and not text
    return (
        f"Column {answers!r} lists several answers and {score!r} orders them: they have to be paired first. Run: "
        f"prefopt pair DATA --out pairs.jsonl{_option('prompt', _prompt_of(names, rows))} --answers {answers}"
        f"{_option('text', text)} --{by} {score}. It takes the best and the worst answer of a row, the {best} being "
        f"the best{' (it must be the rank of each answer, not a list of their places)' if order else ''}; --every "
        "takes all pairs, and --lists writes all answers as one group, for losses over groups."
    )


def _meaning(column: str) -> tuple[str, str]:
    """The option for a column of numbers, and which of them is the best."""
    return ("rank", "lowest rank") if _RANK.fullmatch(column) else ("score", "highest score")


def _option(name: str, value: str | None) -> str:
    return f" --{name} {shlex.quote(value)}" if value else ""


def _prompt_of(names: Sequence[str], rows: Sequence[Row]) -> str | None:
    """The column of the prompt, or a field in one: the longest text of an object."""
    found = next((name for name in _PROMPTS if name in names), None)
    paths = {path for row in rows for path in fields_of(row) if found is None or path.startswith(f"{found}.")}
    texts = [path for path in paths if found or path.rpartition(".")[2] in (*_PROMPTS, "post")]
    if found is None or not any(writing(row.get(found)) for row in rows):
        return max(texts, key=lambda path: sum(len(plain_text(value_at(row, path))) for row in rows), default=found)
    return found


def _word(value: Any) -> str:
    """A verdict as text for the command line; 1.0 is 1, since a column with a null holds floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """A rank or a score, also if it is true, false or text (`"4"`); None for `N/A`, NaN and others."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
