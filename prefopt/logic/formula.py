"""The grammar of formulas over predictions: `M(l) -> M(w)`, `not (M(w) and Ref(l))`. Plain Python.

formula    = implication ( "<->" implication )*
implication = disjunction [ "->" implication ]
disjunction = exclusive ( ("or" | "|") exclusive )*
exclusive  = conjunction ( ("xor" | "^") conjunction )*
conjunction = negation ( ("and" | "&") negation )*
negation   = ("not" | "~" | "!") negation | "(" formula ")" | "true" | "false" | atom
atom       = ("M" | "Ref" | "Prev") "(" ("w" | "l" | "s") ")"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from prefopt.safety.errors import PrefoptError

_TOKEN = re.compile(
    r"\s*(?:(?P<atom>(?:M|Ref|Prev)\s*\(\s*(?:w|l|s)\s*\))|(?P<word>[A-Za-z_]\w*)|(?P<sign><->|->|[()&|^~!])|(?P<bad>\S))"
)
_SAME = {"&": "and", "|": "or", "^": "xor", "~": "not", "!": "not", "->": "->", "<->": "<->", "(": "(", ")": ")"}
_WORDS = ("and", "or", "xor", "not", "true", "false")
_LONGEST, _DEEPEST = 1000, 100

_BINARY: dict[str, tuple[int, Callable[[bool, bool], bool]]] = {
    "<->": (0, lambda a, b: a == b),
    "->": (1, lambda a, b: b or not a),
    "or": (2, lambda a, b: a or b),
    "xor": (3, lambda a, b: a != b),
    "and": (4, lambda a, b: a and b),
}
"""Precedence and meaning of each connective."""


class FormulaError(PrefoptError, ValueError):
    """A formula that cannot be parsed; the message shows where."""


@dataclass(frozen=True)
class Formula:
    """A formula as a tree: an atom, `true` or `false`, `not` and one part, or a connective and two.

    Attributes:
        head: an atom such as `M(w)`, "true", "false", "not" or a connective.
        parts: what it is applied to.
    """

    head: str
    parts: tuple[Formula, ...] = ()

    @property
    def atoms(self) -> tuple[str, ...]:
        """The atoms in order of first appearance."""
        if self.parts:
            return tuple(dict.fromkeys(atom for part in self.parts for atom in part.atoms))
        return () if self.head in ("true", "false") else (self.head,)

    def holds(self, row: Mapping[str, bool]) -> bool:
        """Whether the formula is true under the truth values in `row`."""
        if self.head in _BINARY:
            left, right = (part.holds(row) for part in self.parts)
            return _BINARY[self.head][1](left, right)
        if self.head == "not":
            return not self.parts[0].holds(row)
        return self.head == "true" or (self.head != "false" and row[self.head])

    def __str__(self) -> str:
        if self.head in _BINARY:
            return f" {self.head} ".join(part._within(self.head) for part in self.parts)
        return f"not {self.parts[0]._within('not')}" if self.head == "not" else self.head

    def _within(self, outer: str) -> str:
        """Text inside another formula, in parentheses if they are needed."""
        plain = self.head not in _BINARY or (outer == self.head and outer in ("and", "or", "xor"))
        return str(self) if plain else f"({self})"


def parse_formula(text: str) -> Formula:
    """Read a formula.

    Raises:
        FormulaError: with the text and a mark under the column that could not be read.
    """
    return _Parser(text).whole()


class _Parser:
    """Precedence climbing over the tokens of one text."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        self.place = 0
        self.depth = 0
        if len(text) > _LONGEST:
            raise FormulaError(f"the formula has {len(text)} characters, at most {_LONGEST} are read")
        for match in _TOKEN.finditer(text):
            start = match.start(str(match.lastgroup))
            if match["bad"]:
                self.fail(start, f"unexpected character {match['bad']!r}")
            if match["word"] and match["word"] not in _WORDS:
                self.fail(start, f"{match['word']!r} is not a prediction: write M(w), M(l), M(s), Ref(w), Prev(l) ...")
            token = match["word"] or _SAME.get(match["sign"] or "") or re.sub(r"\s", "", match["atom"])
            self.tokens.append((token, start))

    def fail(self, column: int, problem: str) -> NoReturn:
        raise FormulaError(f"{problem}, at column {column + 1}:\n  {self.text}\n  {' ' * column}^")

    @property
    def next(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    @property
    def column(self) -> int:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else len(self.text)

    def whole(self) -> Formula:
        formula = self.binary(0)
        if self.next:
            self.fail(self.column, f"expected a connective (and, or, xor, ->, <->), found {self.next!r}")
        return formula

    def binary(self, least: int) -> Formula:
        self.deeper()
        formula = self.negation()
        while self.next in _BINARY and (binds := _BINARY[self.next][0]) >= least:
            head = self.next
            self.place += 1
            # Implication associates to the right: a -> b -> c is a -> (b -> c).
            formula = Formula(head, (formula, self.binary(binds if head == "->" else binds + 1)))
        self.depth -= 1
        return formula

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            self.fail(self.column, f"nested more than {_DEEPEST} deep")

    def negation(self) -> Formula:
        self.deeper()
        token, column = self.next, self.column
        self.place += 1
        if token == "not":
            formula = Formula("not", (self.negation(),))
        elif token == "(":
            formula = self.binary(0)
            if self.next != ")":
                self.fail(self.column, f"expected ')' for the '(' at column {column + 1}")
            self.place += 1
        elif token in ("true", "false") or (token.endswith(")") and token != ")"):
            formula = Formula(token)
        else:
            self.fail(column, f"expected a prediction, 'not' or '(', found {token or 'the end'!r}")
        self.depth -= 1
        return formula
