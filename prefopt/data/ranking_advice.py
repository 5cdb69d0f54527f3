"""The `prefopt pair` command for data that rank, rate or compare answers, recognised by columns and values.

A column is taken for a score only by its name: a length or a loss orders answers too, but not by how good they are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from prefopt.data.columns import is_metadata
from prefopt.data.messages import plain_text, role, writing
from prefopt.data.paths import fields_of, parsed, value_at
from prefopt.data.rankings import Row, is_number, number_of, word_of

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
    values = sorted({word_of(row.get(winner)) for row in rows})
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
    return number_of(value) is not None


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
                if _SCORE.fullmatch(field) and any(number_of(item.get(field)) is not None for item in items)
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
                and any(number_of(value) is not None for value in flat[score])
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
        if any(number_of(value) is not None for _, values in both for value in values):
            by, best = _meaning(name)
            return (
                f"Column {name!r} has a number for each of the 'completions', and without 'scores' these would "
                f"be taken as in order, the best first. If the {best} is the best, run: prefopt pair DATA --out "
                f"groups.jsonl --prompt prompt --answers completions --{by} {name} --lists. If the 'completions' are "
                f"the steps of one answer, they are not preferences. If they are in order: --columns unused={name}."
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
