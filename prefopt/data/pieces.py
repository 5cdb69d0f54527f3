"""The texts of a message that its tokens must contain, and whether a decoded text contains them.

Texts are compared without white space, which templates trim and tokenizers may move, and in the form in which the
tokenizer decodes them (lower case, or normalised characters). Imports `conversation` and `encodings`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.data.conversation import calls_of
from prefopt.data.encodings import Encodings

TAKEN = "\0"
"""Replaces a text that was found."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_CLOSED = re.compile(r".*(?:</[^<>\s]+>|\[/[^\[\]\s]+\]|<[^<>\s]+\|>|<\|[^<>\s]+>)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A text of a message: its content, a thought, the name or an argument of a call.

    Attributes:
        value: from the row.
        what: its kind, in words.
    """

    value: Any
    what: str

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else str(self.value)

    def forms(self) -> Iterator[str]:
        """The ways a template may print it, most likely first."""
        value = self.value
        if not isinstance(value, str):
            yield json.dumps(value, default=str)
            yield str(value)
            if type(value) is float:
                yield f"{value:g}"
            return
        yield value
        # Escaped twice where JSON text is inside JSON.
        for ascii_only in (False, True):
            yield json.dumps(value, ensure_ascii=ascii_only)[1:-1]


@functools.lru_cache(maxsize=256)
def squeeze(text: str) -> str:
    """The text without white space; a row's texts are compared several times."""
    return "".join(text.split())


class Space:
    """How a tokenizer changes texts: encoded and decoded again."""

    def __init__(self, encodings: Encodings) -> None:
        self._encodings = encodings
        self._unknown = encodings.tokenizer.unk_token

    def known(self, text: str) -> str:
        """Without white space and marks of unknown characters, whose number depends on the text around them."""
        return squeeze(text.replace(self._unknown, " ") if self._unknown else text)

    def _canonical(self, text: str) -> str:
        return self.known(self._encodings.decode(self._encodings.alone(text)))

    def take(self, pieces: Iterable[Piece], text: str) -> tuple[list[Piece], str]:
        """The pieces that `text` (without white space) does not contain, and the rest of `text`."""
        missing = []
        # Long ones first, so that a short one is not found inside them.
        for piece in sorted(pieces, key=lambda piece: -len(piece.text)):
            found = next((form for form in self.forms(piece) if form in text), None)
            if found is None:
                missing.append(piece)
            elif found:
                text = text.replace(found, TAKEN, 1)
        return missing, text

    def forms(self, text: str | Piece) -> Iterator[str]:
        """Ways to compare a text: unchanged, then (slower) as the tokenizer decodes it."""
        yield from map(self.known, text.forms() if isinstance(text, Piece) else (text,))
        yield from map(self._canonical, dict.fromkeys(text.forms() if isinstance(text, Piece) else (text,)))


def pieces_of(message: Mapping[str, Any]) -> list[Piece]:
    """The texts of a message."""
    return [*contents_of(message), *thoughts_of(message), *_calls(message)]


def contents_of(message: Mapping[str, Any]) -> list[Piece]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [Piece(text, "content") for text in texts if isinstance(text, str) and text.strip()]


def thoughts_of(message: Mapping[str, Any]) -> list[Piece]:
    """Thoughts in a separate field."""
    texts = [(name, message.get(name)) for name in _THOUGHTS]
    return [Piece(text, name) for name, text in texts if isinstance(text, str) and text.strip()]


def without_thought(piece: Piece) -> Piece | None:
    """The text after the last closing mark of a content, such as `</think>`; None if there is none."""
    closed = _CLOSED.match(piece.text)
    rest = piece.text[closed.end() :] if closed else ""
    return Piece(rest, piece.what) if rest.strip() else None


def tools_of(tools: list[Any] | None) -> list[Piece]:
    """Names and descriptions, line by line: some templates print them as comments."""
    found = []
    for tool in tools or []:
        inner = tool.get("function") if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
        texts = [inner.get("name"), inner.get("description")] if isinstance(inner, dict) else []
        lines = [line for text in texts if isinstance(text, str) for line in text.splitlines() if line.strip()]
        found += [Piece(line, "tool") for line in lines]
    return found


def _calls(message: Mapping[str, Any]) -> list[Piece]:
    found = []
    for call in calls_of(message):
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        values = [call.get("name"), *_leaves(arguments)]
        found += [Piece(value, "tool call") for value in values if value not in (None, "")]
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
