"""One value of a column as a list of messages, from any form: `from`/`value`, JSON text and more.

Nothing here knows about datasets or columns. Any other value is returned unchanged, so that validation can report it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "prompter": "user",
    "observation": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **{role: role for role in ("system", "user", "assistant", "tool")},
}
"""Other names of speakers, in any case; validation reports unknown ones."""

SPEAKERS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
"""Whose message a text is, by the column that it stands in."""

UNREADABLE = "text among messages"
"""The role of an unreadable text in a column of messages, so that reports can show it."""

_OPENING = re.compile(r"""\s*\[?\s*\{\s*["']""")
_SPEAKER_KEY = re.compile(r"""["'](role|from)["']\s*:\s*["']""")
_TEXT_KEY = re.compile(r"""["'](content|value|tool_calls)["']\s*:""")
_BETWEEN_ITEMS = re.compile(r"\}\s*\n\s*\{")

_LONGEST_LITERAL = 1_000_000
"""Python literals are parsed up to this length only: the parser's memory is many times the text's."""


def without_nulls(value: Any) -> Any:
    """The value without fields that are null; Arrow gives every message all fields of any message."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_json(value: Any) -> Any:
    """The value of JSON text, None for blank text; any other value unchanged.

    Raises:
        ValueError: for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.strip() else None


def same_texts(left: Any, right: Any) -> bool:
    """Equality of texts, messages or lists of them, where a null field equals a missing one."""
    return left == right or bool(without_nulls(left) == without_nulls(right))


def writing(value: Any) -> str | None:
    """How a value is written: `text`, `messages`, or `other messages` that `as_messages` rewrites; None if neither.

    `other messages`: a single message, messages with `from` or `value` or with other names of the roles, an object of
    lists, the JSON or Python text of messages.
    """
    if isinstance(value, str):
        return "text" if _parsed(value) is None else "other messages"
    if _is_message(value) or _is_of_lists(value):
        return "other messages"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "other messages" if any(map(_is_renamed, value)) else "messages"
    return None


def as_messages(value: Any) -> Any:
    """A list of `role`/`content` messages if the value is messages in another form; else the value."""
    if isinstance(value, str):
        parsed = _parsed(value)
        return value if parsed is None else as_messages(parsed)
    if _is_message(value):
        value = [value]
    elif _is_of_lists(value):
        value = [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)]
    if isinstance(value, list):
        return [_renamed(message) if _is_renamed(message) else _without_unused(message) for message in value]
    return value


def looks_like_messages(text: Any) -> bool:
    """Whether a text begins like the JSON or Python text of messages, readable or not."""
    return isinstance(text, str) and bool(
        _OPENING.match(text) and _SPEAKER_KEY.search(text) and _TEXT_KEY.search(text)
    )


def plain_text(value: Any) -> str:
    """All text of a value, to search in: the contents of messages joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return plain_text(value.get("content") or value.get("text") or value.get("value") or "")
    return "\n".join(map(plain_text, value)) if isinstance(value, list) else ""


def in_turns(row: Mapping[str, Any], names: Iterable[str] = tuple(SPEAKERS)) -> dict[str, Any]:
    """Columns of a row that are texts as one message each; others as they are."""
    return {
        name: [{"role": SPEAKERS[name], "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name in names
        if name in row
    }


def role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _speaker(message: Any) -> Any:
    if not isinstance(message, dict):
        return None
    return message.get("role") if message.get("role") is not None else message.get("from")


def _is_message(value: Any) -> bool:
    return isinstance(_speaker(value), str)


def _is_of_lists(value: Any) -> bool:
    """One object with a list of roles and one of contents, as older sets store messages."""
    if not isinstance(value, dict) or not isinstance(_speaker(value), list):
        return False
    return all(isinstance(item, list) for item in value.values()) and len({len(item) for item in value.values()}) == 1


def _is_renamed(message: Any) -> bool:
    speaker = _speaker(message)
    if not isinstance(speaker, str):
        return False
    by_value = message.get("content") is None and message.get("value") is not None
    return message.get("role") is None or by_value or _ROLES.get(speaker.lower(), speaker) != speaker


def _without_unused(message: Any) -> Any:
    """The message without `from` and `value` that Arrow filled in, as other messages have them."""
    if not isinstance(message, dict):
        return message
    return {name: item for name, item in message.items() if item is not None or name not in ("from", "value")}


def _renamed(message: Mapping[str, Any]) -> Message:
    """`role` and `content` in place of `from` and `value`; a function call becomes a tool call."""
    speaker = _speaker(message)
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if speaker == "function_call" and (call := _call(content)) is not None:
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    rest = {name: item for name, item in message.items() if name not in ("from", "value")}
    return {**rest, "role": _ROLES.get(speaker.lower(), speaker), "content": content}


def _call(text: Any) -> dict[str, str] | None:
    """Name and arguments, the arguments as JSON text: objects of several functions do not fit one Arrow type."""
    try:
        call = json.loads(text)
        return {"name": str(call["name"]), "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _parsed(text: str) -> Any:
    """The messages that a text is the JSON (or, as pandas writes it, the Python literal) of; None if it is text."""
    if not looks_like_messages(text):
        return None
    stripped = text.strip()
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        try:
            # An array of numpy has no commas between its items, which are on separate lines.
            literal = _BETWEEN_ITEMS.sub("}, {", stripped)
            value = ast.literal_eval(literal) if len(literal) <= _LONGEST_LITERAL else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    listed = isinstance(value, list) and bool(value) and all(map(_is_message, value))
    return value if listed or _is_message(value) else None
