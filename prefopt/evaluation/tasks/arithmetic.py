"""Arithmetic word problems with known answers, at five levels. They come from templates, so there are many of them.

A prompt is a text: solved problems of the same level, then the problem, so that completions are short and even a model
of 135M parameters solves some. A digest of a problem's operations and numbers decides whether it is for training or
held out, whatever the seed: a model that is trained on one part has not seen the calculations of the other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prefopt.generation.samples import PromptRow
from prefopt.safety.errors import UsageError

Split = Literal["train", "heldout"]

_PEOPLE = (
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Tom",
)
_THINGS = (
    "apples", "balls", "books", "cards", "coins", "cups", "eggs", "lemons", "oranges", "pencils", "shells", "stamps",
    "stickers", "stones",
)  # fmt: skip


@dataclass(frozen=True)
class _Story:
    """A text with names and numbers to fill in, and what to do with b and c after a."""

    text: str
    operations: str


_ADD = (
    _Story("{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?", "+"),
    _Story("{name} finds {a} {things} and {other} finds {b}. How many {things} did they find together?", "+"),
    _Story("There are {a} {things} in a box. {name} puts in {b} more. How many {things} are in the box?", "+"),
)
_SUBTRACT = (
    _Story("{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?", "-"),
    _Story("There are {a} {things} on a table. {name} takes away {b}. How many {things} are left on the table?", "-"),
)
_MULTIPLY = (
    _Story("{name} has {a} bags of {b} {things} each. How many {things} does {name} have?", "*"),
    _Story("{name} buys {a} {things} a day for {b} days. How many {things} does {name} buy?", "*"),
)
_TWO_STEPS = (
    _Story("{name} has {a} {things}, gets {b} more and loses {c}. How many {things} does {name} have now?", "+-"),
    _Story("{name} has {a} {things}, gives away {b} and gets {c}. How many {things} does {name} have now?", "-+"),
)
_MULTIPLY_FIRST = (
    _Story("{name} has {a} bags of {b} {things} each, and {c} more. How many {things} does {name} have?", "*+"),
    _Story("{name} has {a} bags of {b} {things} each and loses {c}. How many {things} does {name} have?", "*-"),
)

_ONE_STEP_SOLVED = (
    ("Sam has 4 pens and gets 3 more. How many pens does Sam have now?", "4 + 3 = 7"),
    ("Sam has 9 pens and gives 3 of them to Rosa. How many pens does Sam have left?", "9 - 3 = 6"),
    ("There are 2 hats in a box. Rosa puts in 6 more. How many hats are in the box?", "2 + 6 = 8"),
)
_SOLVED = {
    1: _ONE_STEP_SOLVED,
    2: (
        ("Sam has 4 boxes of 3 pens each. How many pens does Sam have?", "4 * 3 = 12"),
        ("Sam finds 5 pens a day for 6 days. How many pens does Sam find?", "5 * 6 = 30"),
    ),
    3: _ONE_STEP_SOLVED,
    4: (
        ("Sam has 4 pens, gets 3 more and loses 2. How many pens does Sam have now?", "4 + 3 = 7, 7 - 2 = 5"),
        ("Sam has 9 pens, gives away 3 and gets 5. How many pens does Sam have now?", "9 - 3 = 6, 6 + 5 = 11"),
    ),
    5: (
        ("Sam has 4 boxes of 3 pens each, and 2 more. How many pens does Sam have?", "4 * 3 = 12, 12 + 2 = 14"),
        ("Sam has 5 boxes of 6 pens each and loses 4. How many pens does Sam have?", "5 * 6 = 30, 30 - 4 = 26"),
    ),
}

_LEVELS: dict[int, tuple[tuple[_Story, ...], range]] = {
    1: (_ADD + _SUBTRACT, range(2, 11)),
    2: (_MULTIPLY, range(2, 11)),
    3: (_ADD + _SUBTRACT, range(10, 60)),
    4: (_TWO_STEPS, range(2, 21)),
    5: (_MULTIPLY_FIRST, range(2, 11)),
}
LEVELS = tuple(_LEVELS)
"""1: one sum or difference of small numbers; 2: a product; 3: a sum or difference of two digits; 4: two steps of plus
and minus; 5: a product, then plus or minus."""

STOP = ("\n",)
"""Where a completion ends: a text for `SamplingSettings.stop`."""

MAX_NEW_TOKENS = 24
"""Enough for a solution of any level."""

_HELD_OUT = 5  # one calculation in this many


def problems(split: Split, count: int, *, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[PromptRow]:
    """Different problems; the same arguments give the same ones, and a larger `count` begins with those of a smaller.

    Args:
        split: `train` or `heldout`; no calculation is in both.
        count: how many.
        levels: numbers from `LEVELS`; the problems take turns.
        seed: other seeds give other problems of the split.

    Returns:
        Rows with a text as prompt and the columns `answer` (a number as text, for the judge `number`), `solution`
        (a right completion) and `level`.

    Raises:
        UsageError: for an unknown split or level, or more problems than there are.
    """
    if split not in get_args(Split):
        raise UsageError(f"no split {split!r} of the arithmetic problems: there are {' and '.join(get_args(Split))}")
    if unknown := [level for level in levels if level not in _LEVELS]:
        raise UsageError(f"no level {unknown[0]!r} of the arithmetic problems: there are {LEVELS[0]} to {LEVELS[-1]}")
    if count < 0 or not levels:
        raise UsageError(f"count must be at least 0 and levels not empty, got {count} and {list(levels)}")
    drawn: dict[str, PromptRow] = {}
    streams = [_drawn(split, level, random.Random(f"{seed}/{split}/{level}")) for level in levels]
    repeats = 0
    while len(drawn) < count:
        row = next(streams[len(drawn) % len(streams)])
        repeats = repeats + 1 if row.id in drawn else 0
        if repeats > 1000:
            raise UsageError(f"levels {list(levels)} have fewer than {count} different problems to draw")
        drawn.setdefault(row.id, row)
    return list(drawn.values())


def _drawn(split: Split, level: int, generator: random.Random) -> Iterator[PromptRow]:
    """Problems of one level and split, without end; they may repeat."""
    stories, numbers = _LEVELS[level]
    while True:
        story = generator.choice(stories)
        operands = [generator.choice(numbers) for _ in range(len(story.operations) + 1)]
        name, other = generator.sample(_PEOPLE, 2)
        things = generator.choice(_THINGS)
        steps, answer = _calculation(story.operations, operands)
        if answer > 0 and _split_of(story.operations, operands) == split:
            a, b, c = (*operands, 0)[:3]
            question = story.text.format(name=name, other=other, things=things, a=a, b=b, c=c)
            solved = "".join(f"Q: {asked}\nA: {right}\n\n" for asked, right in _SOLVED[level])
            columns = {"answer": str(answer), "solution": " " + ", ".join(steps), "level": level}
            yield PromptRow(f"{solved}Q: {question}\nA:", columns)


def _calculation(operations: str, operands: Sequence[int]) -> tuple[list[str], int]:
    """The steps as texts and the result; the result is 0 if a step would leave nothing."""
    value = operands[0]
    steps: list[str] = []
    for operation, operand in zip(operations, operands[1:], strict=True):
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operation]
        if result <= 0:
            return steps, 0
        steps.append(f"{value} {operation} {operand} = {result}")
        value = result
    return steps, value


def _split_of(operations: str, operands: Sequence[int]) -> Split:
    # Sorted, so that 3 + 4 and 4 + 3 are in one split.
    facts = f"{operations} {sorted(operands)}".encode()
    return "heldout" if hashlib.sha256(facts).digest()[0] % _HELD_OUT == 0 else "train"
