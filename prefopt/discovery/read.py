"""From text to an expression: `read("softplus(-x) + 0.1 * square(x)")`.

A recursive parser over a closed list of names. Nothing is evaluated, and limits are checked before anything is read:
text comes from language models, too.
"""

from __future__ import annotations

import math
import re
from typing import NoReturn

from prefopt.discovery.grammar import (
    BATCH_FUNCTIONS,
    FUNCTIONS,
    MAX_CONSTANT,
    OPERATIONS,
    Kind,
    Node,
    constant,
    fits,
)
from prefopt.safety.errors import UsageError, did_you_mean

MAX_LENGTH = 400
"""Characters."""
MAX_DEPTH = 14
MAX_SIZE = 60
"""Names, constants and operations."""

_TOKEN = re.compile(
    r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/(),<>]))", re.ASCII
)


class ExpressionError(UsageError):
    """An expression of a margin that cannot be read."""


def read(text: str) -> Node:
    """Read an expression.

    Args:
        text: for example `softplus(-x)`, `relu(1 - x)`, `square(x / beta - 1 / (2 * beta))`.

    Returns:
        Its tree, for which `read(str(tree)) == tree`.

    Raises:
        ExpressionError: with the column and what can stand there.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(text)} characters; at most {MAX_LENGTH} are read")
    if not text.strip():
        raise ExpressionError("the expression is empty")
    node = _Reader(text).whole()
    # Minus signs before minus signs nest without parentheses.
    if node.depth > MAX_DEPTH:
        raise ExpressionError(f"the expression is nested {node.depth} deep; at most {MAX_DEPTH} are read")
    if node.size > MAX_SIZE:
        raise ExpressionError(f"the expression has {node.size} names, constants and operations; at most {MAX_SIZE}")
    return node


class _Reader:
    """Walks the words of one expression from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.words: list[tuple[str, str, int]] = []  # kind, word, column
        self.next = 0
        self.depth = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                column = position + len(text[position:]) - len(text[position:].lstrip())
                raise ExpressionError(f"column {column + 1}: {text[column]!a} does not belong into an expression")
            kind = ("number", "name", "sign")[(match.lastindex or 1) - 1]
            self.words.append((kind, match[match.lastindex or 1], match.start(match.lastindex or 1) + 1))
            position = match.end()

    def fail(self, message: str, column: int | None = None) -> NoReturn:
        if column is None:
            column = self.words[self.next][2] if self.next < len(self.words) else len(self.text) + 1
        raise ExpressionError(f"column {column}: {message}")

    def peek(self) -> str:
        return self.words[self.next][1] if self.next < len(self.words) else ""

    def take(self, word: str) -> None:
        if self.peek() != word:
            self.fail(f"expected {word!r}, got {self.peek()!r}" if self.peek() else f"{word!r} is missing at the end")
        self.next += 1

    def whole(self) -> Node:
        node = self.sum()
        if self.next < len(self.words):
            self.fail(f"{self.peek()!r} does not continue an expression")
        if node.kind != "number":
            self.fail("the expression does not hold x, so it has no gradient", 1)
        return node

    def condition(self) -> Node:
        left = self.sum()
        if self.peek() not in ("<", ">"):
            self.fail("where needs a comparison first, as in where(x > 0, ...)")
        sign = self.peek()
        self.next += 1
        return Node(sign, (left, self.sum()))

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested too deep; at most {MAX_DEPTH} are read")
        node = self.product()
        while self.peek() in ("+", "-"):
            sign = self.peek()
            self.next += 1
            node = Node(sign, (node, self.product()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while self.peek() in ("*", "/"):
            sign, column = self.peek(), self.words[self.next][2]
            self.next += 1
            right = self.signed()
            if sign == "/" and right.kind != "setting":
                self.fail("what divides must hold no x", column)
            node = Node(sign, (node, right))
        return node

    def signed(self) -> Node:
        minus = 0
        while self.peek() == "-":
            minus += 1
            self.next += 1
            if minus > MAX_DEPTH:
                self.fail("too many minus signs")
        literal = self.next < len(self.words) and self.words[self.next][0] == "number"
        node = self.atom()
        if literal and minus:
            node, minus = constant(-node.value), minus - 1
        for _ in range(minus):
            node = Node("negative", (node,))
        return node

    def atom(self) -> Node:
        if self.next >= len(self.words):
            self.fail("the expression ends too early")
        kind, word, column = self.words[self.next]
        self.next += 1
        if kind == "number":
            value = float(word)
            if not math.isfinite(value) or value > MAX_CONSTANT:
                self.fail(f"the constant {word[:20]} is above {MAX_CONSTANT:g}", column)
            return constant(value)
        if word == "(":
            node = self.sum()
            self.take(")")
            return node
        if kind == "sign":
            self.fail(f"{word!r} cannot stand here", column)
        if word in ("x", "beta"):
            return Node(word)
        return self.call(word, column)

    def call(self, name: str, column: int) -> Node:
        if name not in FUNCTIONS and name not in BATCH_FUNCTIONS:
            known = [*FUNCTIONS, *BATCH_FUNCTIONS, "x", "beta"]
            self.fail(f"nothing is named {name[:40]!r}{did_you_mean(name, known)}", column)
        takes: tuple[Kind, ...] = OPERATIONS[name].takes
        self.take("(")
        parts: list[Node] = []
        for number, kind in enumerate(takes):
            if number:
                self.take(",")
            part = self.condition() if kind == "condition" else self.sum()
            assert fits(part.kind, kind)
            parts.append(part)
        self.take(")")
        return Node(name, tuple(parts))
