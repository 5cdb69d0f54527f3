"""Expressions of a margin: trees over x = beta d, beta and constants, with a closed list of operations.

Every operation takes tensors of any shape and is finite for finite arguments up to overflow; what divides is free of
x, so no expression has a pole. The shapes of `prefopt.losses.shapes` are operations, too. Imports torch and losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.numerics import capped_exp
from prefopt.losses.shapes import SHAPES

Kind = Literal["number", "setting", "condition"]
"""What a part of an expression is; a setting is a number without x."""

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mean and variance over the batch of one value per pair."""

MAX_CONSTANT = 1e4


@dataclass(frozen=True)
class Operation:
    """One operation of the grammar.

    Attributes:
        takes: what each argument must be.
        compute: the tensor function; None for leaves and batch statistics.
        gives: what the result is.
        means: one line for people and language models.
    """

    takes: tuple[Kind, ...]
    compute: Callable[..., Tensor] | None
    means: str
    gives: Kind = "number"


LEAVES = ("x", "beta", "constant")
_ONE: tuple[Kind, ...] = ("number",)
_TWO: tuple[Kind, ...] = ("number", "number")

SIGNS: dict[str, Operation] = {
    "+": Operation(_TWO, torch.add, "sum"),
    "-": Operation(_TWO, torch.sub, "difference"),
    "*": Operation(_TWO, torch.mul, "product"),
    "/": Operation(("number", "setting"), torch.div, "quotient; what divides holds no x"),
    "<": Operation(_TWO, torch.lt, "comparison, for where", "condition"),
    ">": Operation(_TWO, torch.gt, "comparison, for where", "condition"),
}
"""Operations between their two arguments."""

FUNCTIONS: dict[str, Operation] = {
    # Not torch's softplus, which is a straight line from 20 on.
    "softplus": Operation(_ONE, lambda a: -F.logsigmoid(-a), "log(1 + e^a)"),
    "logsigmoid": Operation(_ONE, F.logsigmoid, "log(1 / (1 + e^-a))"),
    "sigmoid": Operation(_ONE, torch.sigmoid, "1 / (1 + e^-a)"),
    "tanh": Operation(_ONE, torch.tanh, "hyperbolic tangent"),
    "atan": Operation(_ONE, torch.atan, "arc tangent"),
    "exp": Operation(_ONE, capped_exp, "e^a, a straight line above a = 30"),
    "relu": Operation(_ONE, torch.relu, "max(a, 0)"),
    "square": Operation(_ONE, torch.square, "a^2"),
    "abs": Operation(_ONE, torch.abs, "|a|"),
    "root1p": Operation(_ONE, lambda a: torch.sqrt(1 + a.square()), "sqrt(1 + a^2)"),
    "min": Operation(_TWO, torch.minimum, "the smaller one"),
    "max": Operation(_TWO, torch.maximum, "the larger one"),
    "where": Operation(("condition", "number", "number"), torch.where, "where(a > b, c, d): c if a > b, else d"),
    **{name: Operation(_ONE, shape, f"the {name} shape of gpo") for name, shape in SHAPES.items()},
}
"""Operations that are written name(argument, ...)."""

BATCH_FUNCTIONS: dict[str, Operation] = {
    "batch_mean": Operation(_ONE, None, "mean over the batch"),
    "batch_var": Operation(_ONE, None, "unbiased variance over the batch"),
}
"""Statistics of the batch, which a search must allow: with them pairs act on one another."""

OPERATIONS = {**SIGNS, **FUNCTIONS, **BATCH_FUNCTIONS, "negative": Operation(_ONE, torch.neg, "-a")}


@dataclass(frozen=True)
class Node:
    """A part of an expression.

    Attributes:
        name: "x", "beta", "constant", or a name in `OPERATIONS`.
        parts: the arguments.
        value: of a constant.
    """

    name: str
    parts: tuple[Node, ...] = ()
    value: float = 0.0

    def __str__(self) -> str:
        return _text(self)[0]

    def walk(self) -> Iterator[Node]:
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def kind(self) -> Kind:
        if self.name in OPERATIONS and OPERATIONS[self.name].gives == "condition":
            return "condition"
        return "number" if any(node.name == "x" for node in self.walk()) else "setting"

    @property
    def batchwise(self) -> bool:
        """Whether pairs of a batch act on one another."""
        return any(node.name in BATCH_FUNCTIONS for node in self.walk())

    @property
    def size(self) -> int:
        return sum(1 for _ in self.walk())

    @property
    def depth(self) -> int:
        return 1 + max((part.depth for part in self.parts), default=0)


X, BETA = Node("x"), Node("beta")


def constant(value: float) -> Node:
    return Node("constant", (), value)


def fits(kind: Kind, wanted: Kind) -> bool:
    """Whether a part of one kind can stand where another is wanted: a setting is a number."""
    return kind == wanted or (kind == "setting" and wanted == "number")


def over_last_axis(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the last axis, kept as an axis of 1; a lone value has variance 0."""
    variance = values.var(-1, keepdim=True) if values.shape[-1] > 1 else torch.zeros_like(values)
    return values.mean(-1, keepdim=True), variance


def evaluate(node: Node, x: Tensor, beta: Tensor, moments: Moments = over_last_axis) -> Tensor:
    """The value of an expression for every margin.

    Args:
        node: of kind number.
        x: (..., N) scaled margins.
        beta: of a shape that broadcasts with x.
        moments: of one value per pair over its batch.
    """
    match node.name:
        case "x":
            return x
        case "beta":
            return beta
        case "constant":
            return x.new_full((), node.value)
    parts = [evaluate(part, x, beta, moments) for part in node.parts]
    if node.name in BATCH_FUNCTIONS:
        mean, variance = moments(parts[0].expand_as(x))
        return mean if node.name == "batch_mean" else variance
    compute = OPERATIONS[node.name].compute
    assert compute is not None
    return compute(*parts)


_STRENGTH = {"<": 0, ">": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}
_ATOM = 4


def _text(node: Node) -> tuple[str, int]:
    """The text of a node and how strongly it holds together."""
    if node.name == "constant":
        text = f"{node.value:g}" if float(f"{node.value:g}") == node.value else repr(node.value)
        return text, 3 if text.startswith("-") else _ATOM
    if node.name in LEAVES:
        return node.name, _ATOM
    if node.name == "negative":
        return f"-{_inside(node.parts[0], 3)}", 3
    if node.name in SIGNS:
        strength = _STRENGTH[node.name]
        left, right = node.parts
        return f"{_inside(left, strength)} {node.name} {_inside(right, strength + 1)}", strength
    return f"{node.name}({', '.join(str(part) for part in node.parts)})", _ATOM


def _inside(node: Node, strength: int) -> str:
    text, own = _text(node)
    return text if own >= strength else f"({text})"
