"""Checks of a row before tokenization: nulls, empty texts, wrong types, wrong roles.

Imports only the catalogue of problems, the formats and the names of columns.
"""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.columns import GIVEN_LOGPS
from prefopt.data.groups import COMPLETIONS, SCORES, column_of, is_group, scores_problems, spread, texts_problems
from prefopt.data.messages import UNREADABLE as UNREADABLE_TEXT
from prefopt.data.messages import looks_like_messages, read_json, role, same_texts, without_nulls, writing
from prefopt.data.problems import KINDS
from prefopt.data.transcripts import UNPARSED

Row = Mapping[str, Any]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})

MAX_LOGP = 1e30
"""Given log-probabilities are below this, and above its negative."""

MAX_WEIGHT = 1e9
"""Largest weight of a row: with larger ones other rows have no effect, and float32 is not enough."""

_NOT_THE_TEMPLATES = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *(
            "continue_final_message",
            "tokenize",
            "return_dict",
            "return_tensors",
            "padding",
            "truncation",
            "max_length",
        ),
    }
)
"""Arguments of `apply_chat_template` that a row may not set: they decide what is tokenized, not its text."""

_CALLS = ("tool_calls", "function_call")
_TEXT_ELSEWHERE = ("text", "message", "parts", "utterance", "body")
"""Fields in which other tools keep a message's text, in place of `content`."""

ANSWERING = frozenset({"assistant", "tool", "function", "ipython"})


TOLD = frozenset(name for name in KINDS if name.startswith(("empty", "chosen equals")))
UNREADABLE = frozenset(
    name for name in KINDS if name.startswith(("unparseable", "unreadable", "wrong type", "null", "wrong role"))
)


@dataclass
class Checked:
    """The result for a row.

    Attributes:
        problems: kinds of problems.
        said: the detail for a kind: the texts side by side, or the error.
        ids: the row's id columns, if they were made.
        readable: its texts can be compared with those of other rows.
        plain: it is plain text without a mark of the chat template that the tokenizer has.
    """

    problems: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    ids: dict[str, Any] | None = None
    readable: bool = False
    plain: bool = False

    @property
    def errors(self) -> list[str]:
        return [problem for problem in self.problems if KINDS[problem].severity == "error"]


def check_texts(row: Row, sides: tuple[str, ...], columns: tuple[str, ...]) -> Checked:
    """All checks of a row that need no tokenizer."""
    checked = Checked(list(row_problems(row, sides, list(columns))))
    for problem in checked.problems:
        column = problem.removeprefix("wrong type: ").removeprefix("bad ")
        if column != problem and row.get(column) is not None:
            checked.said[problem] = f" The first such value: {_excerpt(row[column])}."
    # Rows with broken texts cannot be compared or tokenized.
    checked.readable = not any(problem in UNREADABLE for problem in checked.problems)
    return checked


def _excerpt(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]} ..."


def row_problems(row: Row, sides: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Problems of a single row, each at most once."""
    if is_group(sides) and not isinstance(row[COMPLETIONS], list):
        yield f"null {COMPLETIONS}" if row[COMPLETIONS] is None else f"wrong type: {COMPLETIONS}"
        return
    yield from dict.fromkeys(_problems(row, sides, names))


def _problems(row: Row, of: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Problems of a row whose completions, if it is a group, are a list; some may come several times."""
    row, sides = spread(row, of)
    for kept_as, problem in ((UNPARSED, "unparseable transcript"), (UNREADABLE_TEXT, "unreadable messages")):
        if any(_is_kept_as(kept_as, row[name]) for name in ("prompt", *sides)):
            yield problem
            return
    yield from text_problems(row["prompt"], "prompt")
    for side in sides:
        yield from text_problems(row[side], column_of(side))
    written = [row[name] for name in ("prompt", *sides) if looks_like_messages(row[name])]
    if any(writing(text) == "other messages" for text in written):
        yield "wrong type: messages written as text"
    elif written:
        yield "messages read as text"
    if any(_holds_a_date(row.get(name)) for name in ("prompt", *sides, "tools")):
        yield "wrong type: date"
    if len({isinstance(row[name], list) for name in ("prompt", *sides) if row[name] is not None}) > 1:
        yield "wrong type: text beside messages"
    if is_group(of):
        yield from texts_problems([row[side] for side in sides if row[side] is not None])
    elif len(of) == 2 and row["chosen"] is not None and same_texts(row["chosen"], row["rejected"]):
        yield "chosen equals rejected"
    yield from number_problems(row, of, names)
    if isinstance(row["prompt"], list):
        if not _are_tools(row.get("tools")):
            yield "wrong type: tools"
        if not _are_template_arguments(row.get("chat_template_kwargs")):
            yield "wrong type: chat_template_kwargs"


def number_problems(row: Row, sides: tuple[str, ...], names: list[str]) -> Iterator[str]:
    """Problems of the label or the scores, the weight and the given log-probabilities."""
    if is_group(sides) and SCORES in names:
        yield from scores_problems(row)
    if sides == ("completion",) and not is_label(row.get("label")):
        yield "wrong type: label"
    if "weight" in names and not _is_weight(row.get("weight")):
        yield "bad weight"
    if any(name in names and not _is_finite(row.get(name)) for name in GIVEN_LOGPS):
        yield "bad log-probability"


def _holds_a_date(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_a_date, value.values()))
    if isinstance(value, list):
        return any(map(_holds_a_date, value))
    return isinstance(value, datetime.date | datetime.time | datetime.timedelta)


def is_label(value: Any) -> bool:
    """True or false, also as the integers 1 and 0. Text, other numbers and nulls are neither."""
    return isinstance(value, bool) or (type(value) is int and value in (0, 1))


def _is_kept_as(kept_as: str, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and role(value[0]) == kept_as


def text_problems(value: Any, column: str) -> Iterator[str]:
    """Problems of the text or the messages of one column."""
    if value is None:
        yield f"null {column}"
    elif isinstance(value, str):
        if not value.strip():
            yield f"empty {column}"
    elif isinstance(value, list):
        yield from _message_problems(value, column)
    else:
        yield f"wrong type: {column}"


def _message_problems(messages: list[Any], column: str) -> Iterator[str]:
    if not messages:
        yield f"empty {column}"
        return
    if not all(_is_message(message) for message in messages):
        yield f"wrong type: {column}"
        return
    roles = [message["role"] for message in messages]
    if not ROLES.issuperset(roles):
        yield f"wrong role: unknown in {column}"
    elif column == "prompt":
        if roles[-1] == "assistant":
            yield "wrong role: prompt ends with assistant"
    elif roles[0] not in ANSWERING or roles[-1] not in ANSWERING:
        yield f"wrong role: {column} is not the assistant's"
    elif not ANSWERING.issuperset(roles):
        yield f"user turn inside {column}"
    if _is_empty(messages[-1]):
        yield f"empty {column}"


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if content is None and not any(message.get(name) for name in _CALLS):
        return not any(message.get(name) for name in _TEXT_ELSEWHERE)
    return content is None or isinstance(content, str | list)


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Neither text nor a part (an image) nor a tool call: there is nothing to learn."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        return False
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or any(isinstance(text, str) and text.strip() for text in texts):
            return False
    return not any(message.get(name) for name in _CALLS)


def _is_weight(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    number: Any = value  # a comparison with nan is false
    return bool(0 <= number <= MAX_WEIGHT)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_LOGP


def _are_tools(value: Any) -> bool:
    """A list of functions' descriptions; the list and its items may be JSON text."""
    try:
        value = read_json(value)
        value = [read_json(tool) for tool in value] if isinstance(value, list) else value
    except (ValueError, RecursionError):
        return False
    return not value or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value))


def _are_template_arguments(value: Any) -> bool:
    return not value or (isinstance(value, dict) and not _NOT_THE_TEMPLATES.intersection(without_nulls(value)))
