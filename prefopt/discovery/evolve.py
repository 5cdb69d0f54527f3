"""New expressions from old ones: mutation, crossover, and Gaussian steps of the constants. Needs no network.

Each proposal depends on the search's seed, its own number and the population alone, so that a search that was killed
proposes the same again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch

from prefopt.discovery.grammar import (
    BETA,
    FUNCTIONS,
    MAX_CONSTANT,
    OPERATIONS,
    Kind,
    Node,
    X,
    constant,
    evaluate,
    fits,
)
from prefopt.discovery.read import ExpressionError, read

_ATTEMPTS = 50
"""Mutations to try until one can be read and is not known."""

_DIGITS = 3
"""Significant digits of constants: a longer one is another spelling of the same loss."""


@dataclass(frozen=True)
class Member:
    """An expression that can become a parent.

    Attributes:
        number: in the archive.
        node: the expression.
        rank: its place, 0 for the best.
    """

    number: int
    node: Node
    rank: int


@dataclass(frozen=True)
class Proposal:
    """What a proposer answered.

    Attributes:
        text: as it came.
        proposer: who proposed it, with the kind of change.
        parents: numbers in the archive.
        reason: why there is no text, if that is known.
    """

    text: str
    proposer: str
    parents: tuple[int, ...] = ()
    reason: str = ""


def propose(
    members: Sequence[Member], known: AbstractSet[str], seed: int, number: int, batchwise: bool = False
) -> Proposal:
    """A change of one or two members.

    Args:
        members: the population, at least one.
        known: texts that have been proposed; they are avoided where possible.
        seed: of the search.
        number: of the proposal.
        batchwise: whether statistics of the batch may come in.
    """
    draw = random.Random(f"{seed}:{number}")
    change = _Change(draw, batchwise)
    parents: tuple[int, ...] = ()
    text, proposer = "", "evolution"
    for _ in range(_ATTEMPTS):
        first, second = _parent(members, draw), _parent(members, draw)
        name = draw.choices(list(_CHANGES), [weight for weight, _ in _CHANGES.values()])[0]
        child = simpler(_CHANGES[name][1](change, first.node, second.node))
        text, proposer = str(child), f"evolution: {name}"
        parents = (first.number, second.number) if name in _OF_TWO else (first.number,)
        try:
            text = str(read(text))
        except ExpressionError:
            continue
        if text not in known:
            break
    return Proposal(text, proposer, parents)


def _parent(members: Sequence[Member], draw: random.Random) -> Member:
    """The best of three drawn members."""
    return min((draw.choice(members) for _ in range(3)), key=lambda member: member.rank)


class _Change:
    """The changes; each takes two parents and returns a child."""

    def __init__(self, draw: random.Random, batchwise: bool):
        self.draw = draw
        names = [*FUNCTIONS, *(["batch_mean", "batch_var"] if batchwise else [])]
        self.unary = [name for name in names if OPERATIONS[name].takes == ("number",)]

    def constants(self, first: Node, second: Node) -> Node:
        """A Gaussian step of the logarithm of each constant, or a constant in front."""
        if not any(node.name == "constant" for node in first.walk()):
            return (
                Node("*", (constant(self.number()), first)) if self.draw.random() < 0.1 else self.scale(first, second)
            )
        step = self.draw.choice([0.05, 0.2, 0.7])
        return _mapped(
            first, lambda node: constant(self.stepped(node.value, step)) if node.name == "constant" else node
        )

    def scale(self, first: Node, second: Node) -> Node:
        """x becomes c x, x - c or x * beta^+-1 everywhere."""
        number = constant(self.number())
        inner = self.draw.choice(
            [Node("*", (number, X)), Node("-", (X, number)), Node("*", (X, BETA)), Node("/", (X, BETA))]
        )
        return _mapped(first, lambda node: inner if node.name == "x" else node)

    def point(self, first: Node, second: Node) -> Node:
        """Another part in place of one."""
        place = self.draw.choice(list(first.walk()))
        return _replaced(first, place, self.tree(place.kind, 2))

    def function(self, first: Node, second: Node) -> Node:
        """Another function of the same arguments, or a function around a part."""
        calls = [node for node in first.walk() if node.name in self.unary]
        if calls and self.draw.random() < 0.7:
            place = self.draw.choice(calls)
            return _replaced(first, place, Node(self.draw.choice(self.unary), place.parts))
        place = self.draw.choice([node for node in first.walk() if node.kind != "condition"])
        return _replaced(first, place, Node(self.draw.choice(self.unary), (place,)))

    def shorter(self, first: Node, second: Node) -> Node:
        """A part in place of the whole that it belongs to."""
        wholes = [node for node in first.walk() if node.parts and node.kind != "condition"]
        if not wholes:
            return self.point(first, second)
        place = self.draw.choice(wholes)
        part = self.draw.choice(place.parts)
        return first if part.kind == "condition" else _replaced(first, place, part)

    def swap(self, first: Node, second: Node) -> Node:
        """A part of the second parent in place of one of the first."""
        place = self.draw.choice(list(first.walk()))
        parts = [node for node in second.walk() if fits(node.kind, place.kind)]
        return _replaced(first, place, self.draw.choice(parts)) if parts else first

    def sum(self, first: Node, second: Node) -> Node:
        """The first parent plus a multiple of the second or of a new term."""
        other = second if self.draw.random() < 0.5 else self.tree("number", 2)
        return Node("+", (first, Node("*", (constant(self.number()), other))))

    def blend(self, first: Node, second: Node) -> Node:
        """One parent on one side of a margin, the other on the other, softly or at once."""
        border = constant(self.draw.choice([0.0, self.number()]))
        if self.draw.random() < 0.5:
            return Node("where", (Node(">", (X, border)), first, second))
        gate = Node("sigmoid", (Node("/", (Node("-", (X, border)), constant(self.number()))),))
        rest = Node("-", (constant(1.0), gate))
        return Node("+", (Node("*", (gate, first)), Node("*", (rest, second))))

    # ---- parts ----------------------------------------------------------------------------------------------------

    def number(self) -> float:
        return _rounded(math.exp(self.draw.gauss(-0.5, 1.2)))

    def stepped(self, value: float, step: float) -> float:
        if value == 0 or self.draw.random() < 0.05:
            return _rounded(value + self.draw.gauss(0, step))
        return _rounded(value * math.exp(self.draw.gauss(0, step)))

    def tree(self, kind: Kind, depth: int) -> Node:
        """A random part of a kind, at most this deep below its root."""
        if kind == "condition":
            return Node(self.draw.choice("<>"), (self.tree("number", 1), self.tree("setting", 0)))
        if kind == "setting":
            return self.draw.choice([BETA, constant(self.number()), constant(self.number())])
        if depth <= 0 or self.draw.random() < 0.25:
            return self.draw.choice([X, X, X, constant(self.number()), Node("negative", (X,))])
        if self.draw.random() < 0.5:
            return Node(self.draw.choice(self.unary), (self.tree("number", depth - 1),))
        sign = self.draw.choice(["+", "-", "*", "/", "min", "max"])
        right: Kind = "setting" if sign == "/" else "number"
        return Node(sign, (self.tree("number", depth - 1), self.tree(right, depth - 1)))


_CHANGES: dict[str, tuple[float, Callable[[_Change, Node, Node], Node]]] = {
    "constants": (3.0, _Change.constants),
    "scale": (1.0, _Change.scale),
    "point": (1.5, _Change.point),
    "function": (1.5, _Change.function),
    "shorter": (1.0, _Change.shorter),
    "swap": (1.5, _Change.swap),
    "sum": (1.5, _Change.sum),
    "blend": (1.0, _Change.blend),
}
"""Weight and function of each change."""
_OF_TWO = ("swap", "sum", "blend")


def simpler(node: Node) -> Node:
    """The same function in fewer words: numbers are computed, factors joined, what does nothing is left out."""
    node = Node(node.name, tuple(simpler(part) for part in node.parts), node.value)
    parts = node.parts
    if not parts:
        return node
    if node.kind == "setting" and not any(part.name == "beta" for part in node.walk()):
        value = float(evaluate(node, torch.zeros((), dtype=torch.float64), torch.ones(())))
        return constant(_rounded(value)) if abs(value) <= MAX_CONSTANT else node
    if node.name == "negative" and parts[0].name == "negative":
        return parts[0].parts[0]
    if node.name in ("min", "max") and parts[0] == parts[1]:
        return parts[0]
    if node.name == "*" and parts[1].name == "constant":
        node = Node("*", (parts[1], parts[0]))
    if node.name == "*" and node.parts[0] == constant(1.0):
        return node.parts[1]
    if node.name == "*" and [part.name for part in node.parts] == ["constant", "*"]:
        first, (second, rest) = node.parts[0], node.parts[1].parts
        if second.name == "constant":
            return Node("*", (constant(_rounded(first.value * second.value)), rest))
    return node


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _mapped(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree with every leaf changed."""
    if not node.parts:
        return change(node)
    return Node(node.name, tuple(_mapped(part, change) for part in node.parts), node.value)


def _replaced(node: Node, place: Node, other: Node) -> Node:
    """The tree with the first part that is this very object replaced."""
    if node is place:
        return other
    parts = list(node.parts)
    for number, part in enumerate(parts):
        changed = _replaced(part, place, other)
        if changed is not part:
            parts[number] = changed
            return Node(node.name, tuple(parts), node.value)
    return node
