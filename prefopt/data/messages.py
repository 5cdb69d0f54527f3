"""One value of a column as a list of messages, however it is written: a single message, `from`/`value`, JSON text.

Nothing here knows of datasets or columns. A value that is none of these comes back as it is, so that validation can
report it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
"""ShareGPT's speakers; others (`user`, `system`, `tool`) are roles already."""

_LONGEST_LITERAL = 1_000_000
"""Python literals are parsed up to this length only: the parser's memory is many times the text's."""


def without_nulls(value: Any) -> Any:
    """The value without fields that are null; Arrow gives every message all fields of any message."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_json(value: Any) -> Any:
    """What JSON text holds, None for blank text; any other value as it is.

    Raises:
        ValueError: for text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.strip() else None


def same_texts(left: Any, right: Any) -> bool:
    """Equality of texts, messages or lists of them, a null field being the same as a missing one."""
    return left == right or bool(without_nulls(left) == without_nulls(right))


def writing(value: Any) -> str | None:
    """How a value is written: `text`, `messages`, or `other messages` that `as_messages` rewrites; None if neither.

    `other messages`: a single message, messages with `from` and `value`, the JSON or Python text of messages.
    """
    if isinstance(value, str):
        return "text" if _parsed(value) is None else "other messages"
    if _is_message(value):
        return "other messages"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "other messages" if any(_is_from_value(message) for message in value) else "messages"
    return None


def as_messages(value: Any) -> Any:
    """A list of `role`/`content` messages, where the value is messages written in another way; else the value."""
    if isinstance(value, str):
        parsed = _parsed(value)
        return value if parsed is None else as_messages(parsed)
    if _is_message(value):
        value = [value]
    if isinstance(value, list):
        return [_renamed(message) if _is_from_value(message) else message for message in value]
    return value


def plain_text(value: Any) -> str:
    """All text of a value, to look for one text in another: contents of messages one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return plain_text(value.get("content") or value.get("text") or "")
    return "\n".join(map(plain_text, value)) if isinstance(value, list) else ""


def role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _is_message(value: Any) -> bool:
    return _is_from_value(value) or (isinstance(value, dict) and isinstance(value.get("role"), str))


def _is_from_value(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") is None and isinstance(message.get("from"), str)


def _renamed(message: Mapping[str, Any]) -> Message:
    """ShareGPT's `from` and `value` as `role` and `content`; a function call becomes a tool call."""
    speaker, content = message["from"], message.get("value")
    if speaker == "function_call" and (call := _call(content)) is not None:
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": _ROLES.get(speaker, speaker), "content": content}


def _call(text: Any) -> dict[str, str] | None:
    """Name and arguments, the arguments as JSON text: objects of several functions fit in no one Arrow type."""
    try:
        call = json.loads(text)
        return {"name": str(call["name"]), "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _parsed(text: str) -> Any:
    """The messages that a text is the JSON (or, as pandas writes it, the Python literal) of; None if it is text."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{")) or not any(key in stripped for key in ("role", "from")):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(stripped) if len(stripped) <= _LONGEST_LITERAL else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    listed = isinstance(value, list) and bool(value) and all(map(_is_message, value))
    return value if listed or _is_message(value) else None
