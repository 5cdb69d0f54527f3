"""From text to a loss: `parse("dpo(beta=0.1) + 0.2*sft")`.

The text is Python's expression syntax, read with `ast` and walked by a whitelist: registered names, calls of them,
numbers, strings, + - * / and parentheses. An argument whose type has `choices()`, such as a kernel, can be a call of
one of them: `kernel_dpo(kernel=rbf(bandwidth=0.5))`. Nothing is evaluated.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from prefopt.losses.base import Loss, WeightedSum
from prefopt.losses.errors import LossError
from prefopt.losses.registry import arguments_of, describe_arguments, makers

MAX_LENGTH = 2000
"""Longest accepted expression, in characters; real ones have a tenth of that."""

MAX_NUMBER = 10**300
"""Largest whole number in an expression, well within what a float can hold."""


LIST = "`prefopt losses` lists all"
"""Where a person finds the names, which are too many for a message."""
OWN = "One of your own must be imported first; commands take --loss_file FILE.py"


class LossSyntaxError(LossError):
    """A loss expression that cannot be read.

    Attributes:
        text: the expression.
        column: where the error starts, counted from 1.
    """

    def __init__(self, message: str, text: str, column: int, width: int = 1):
        self.text = text
        self.column = column
        shown = text if len(text) <= 200 else text[:200] + "..."
        shown = shown.encode("utf-8", "replace").decode()  # half a character cannot be printed
        marker = " " * (column - 1) + "^" * max(1, min(width, len(shown) - column + 1)) if column <= 200 else ""
        super().__init__(f"in the loss expression, column {column}: {message}\n  {shown}\n  {marker}".rstrip())


class UnknownLossError(LossSyntaxError):
    """A name in a loss expression that no loss and no preset has."""


def parse(text: str) -> Loss:
    """Read a loss expression.

    Args:
        text: for example `dpo`, `ipo(beta=0.2)`, `dpo(beta=0.1, label_smoothing=0.1) + 0.2*sft`.

    Returns:
        The loss; a sum or a scaled loss is a `WeightedSum`. `parse(str(loss))` gives an equal loss.

    Raises:
        LossSyntaxError: with the column, the nearest valid name and the valid arguments.
    """
    if not isinstance(text, str):
        raise TypeError(f"a loss expression is a string, got {type(text).__name__}")
    # YAML block scalars put line breaks into an expression; columns stay right because lengths do not change.
    text = text.replace("\r", " ").replace("\n", " ").replace("\t", " ")
    if not text.strip():
        raise LossSyntaxError(f"the expression is empty: write one, as in dpo(beta=0.1). {LIST}", text, 1)
    if not text.isprintable():
        column = next(i for i, character in enumerate(text, start=1) if not character.isprintable())
        raise LossSyntaxError(
            f"the character {text[column - 1]!a} does not belong here: delete it or type a space",
            text,
            column,
        )
    if len(text) > MAX_LENGTH:
        raise LossSyntaxError(f"the expression has {len(text)} characters, at most {MAX_LENGTH} are read", text, 1)
    indent = len(text) - len(text.lstrip())
    try:
        tree = ast.parse(text[indent:], mode="eval")
    except SyntaxError as error:
        column = min((error.offset or 1) + indent, len(text) + 1)
        raise LossSyntaxError(f"not a loss expression ({error.msg})", text, column) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise LossSyntaxError(f"not a loss expression ({error})", text, 1) from None
    reader = _Reader(text, indent)
    try:
        return reader.loss(tree.body)
    except RecursionError:
        raise LossSyntaxError("the expression is nested too deeply", text, 1) from None


class _Reader:
    """Walks the syntax tree of one expression and knows the position of each node in the text."""

    def __init__(self, text: str, indent: int):
        self.text = text
        self.indent = indent

    def fail(
        self, node: ast.AST, message: str, width: int | None = None, kind: type[LossSyntaxError] = LossSyntaxError
    ) -> NoReturn:
        # ast counts bytes of UTF-8, people count characters.
        encoded = self.text[self.indent :].encode()
        start = len(encoded[: getattr(node, "col_offset", 0)].decode(errors="replace"))
        end = len(encoded[: getattr(node, "end_col_offset", None) or 0].decode(errors="replace"))
        raise kind(message, self.text, start + self.indent + 1, width or max(1, end - start))

    def loss(self, node: ast.expr) -> Loss:
        """A node that must be a loss."""
        match node:
            case ast.Name():
                return self.build(node, node, [], [])
            case ast.Call(func=ast.Name() as name):
                return self.build(node, name, node.args, node.keywords)
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                left, right = self.loss(node.left), self.loss(node.right)
                return left + right if isinstance(node.op, ast.Add) else left - right
            case ast.BinOp(op=ast.Mult()):
                return self.scaled(node)
            case ast.BinOp(op=ast.Div()):
                divisor = self.number(node.right)
                if divisor == 0:
                    self.fail(node.right, "a loss cannot be divided by zero")
                return self.times(node, self.loss(node.left), 1 / divisor)
            case ast.UnaryOp(op=ast.USub()):
                return self.loss(node.operand) * -1.0
            case ast.UnaryOp(op=ast.UAdd()):
                return self.loss(node.operand)
            case ast.Constant():
                self.fail(node, f"{_short(node.value)} alone is not a loss; scale one with it, as in 0.2*sft")
            case ast.Call():
                self.fail(node.func, "only a registered loss can be called")
            case _:
                self.fail(
                    node,
                    "a loss expression holds loss names, their arguments, numbers and + - * / only",
                )

    def scaled(self, node: ast.BinOp) -> WeightedSum:
        for weight, loss in ((node.left, node.right), (node.right, node.left)):
            if self.is_number(weight):
                return self.times(node, self.loss(loss), self.number(weight))
        self.fail(node, "one side of * must be a number, as in 0.2*sft")

    def times(self, node: ast.BinOp, loss: Loss, weight: float) -> WeightedSum:
        try:
            return loss * weight
        except ValueError as error:
            said = "the factors multiply to more than a number can hold" if "finite" in str(error) else str(error)
            self.fail(node, said)

    def is_number(self, node: ast.expr) -> bool:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return self.is_number(node.operand)
        return isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value is not True

    def number(self, node: ast.expr) -> float:
        if not self.is_number(node):
            self.fail(node, "expected a number")
        value = self.value(node)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            self.fail(node, "the number is too large")
        return value

    def value(self, node: ast.expr, hint: Any = Any) -> Any:
        """An argument of type `hint`: a constant, a signed number, one of the type's choices, or a loss."""
        choices = _choices(hint)
        match node:
            case (ast.Name() as name) | ast.Call(func=ast.Name() as name) if choices:
                if name.id not in choices:
                    self.fail(name, f"expected {_type_name(hint)}, got {_short(name.id)}")
                args, keywords = (node.args, node.keywords) if isinstance(node, ast.Call) else ([], [])
                return self.call(node, name.id, choices[name.id], args, keywords)
            case ast.Constant(value=bool() | int() | float() | str() | None):
                if isinstance(node.value, int) and abs(node.value) > MAX_NUMBER:
                    self.fail(node, "the number is too large")
                return node.value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()) if self.is_number(node):
                inner = self.value(node.operand)
                return -inner if isinstance(node.op, ast.USub) else inner
            case ast.Constant():
                self.fail(
                    node, f"{_short(node.value)} is not a valid argument; use a number, a string, True, False or None"
                )
            case _:
                return self.loss(node)

    def build(self, node: ast.expr, name: ast.Name, args: list[ast.expr], keywords: list[ast.keyword]) -> Loss:
        losses = makers()
        if name.id not in losses:
            near = difflib.get_close_matches(name.id.lower(), losses, n=3, cutoff=0.6)
            hint = f", did you mean {' or '.join(map(repr, near))}?" if near else "."
            self.fail(name, f"no loss is named {_short(name.id)}{hint} {LIST}. {OWN}", kind=UnknownLossError)
        loss: Loss = self.call(node, name.id, losses[name.id], args, keywords)
        return loss

    def call(
        self, node: ast.expr, name: str, make: Callable[..., Any], args: list[ast.expr], keywords: list[ast.keyword]
    ) -> Any:
        """What `make` returns for these arguments, each checked against the type that `make` declares."""
        parameters = arguments_of(make)
        hints = get_type_hints(cast(Any, make).__init__ if isinstance(make, type) else make)
        nodes: dict[str, ast.expr] = {}
        for position, argument in enumerate(args):
            if isinstance(argument, ast.Starred) or position >= len(parameters):
                self.fail(argument, f"{name} takes at most {len(parameters)} arguments: {describe_arguments(make)}")
            nodes[list(parameters)[position]] = argument
        for keyword in keywords:
            if keyword.arg is None or keyword.arg not in parameters:
                self.unknown_argument(name, keyword, make, hints)
            if keyword.arg in nodes:
                self.fail(keyword, f"{name} got {keyword.arg!r} twice", len(keyword.arg))
            nodes[keyword.arg] = keyword.value
        values = {key: self.value(where, hints.get(key, Any)) for key, where in nodes.items()}
        for key, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and key not in values:
                self.fail(node, f"{name} needs an argument {key!r}; its arguments: {describe_arguments(make)}")
        for key, value in values.items():
            if not _fits(value, hints.get(key, Any)):
                self.fail(nodes[key], f"{name}'s {key} must be {_type_name(hints[key])}, got {_short(value)}")
        try:
            return make(**values)
        except ValueError as error:
            culprit = next((where for key, where in nodes.items() if str(error).startswith(key)), node)
            self.fail(culprit, f"{name}: {error}")

    def unknown_argument(
        self, name: str, keyword: ast.keyword, make: Callable[..., Any], hints: dict[str, Any]
    ) -> NoReturn:
        parameters = arguments_of(make)
        if keyword.arg is None:
            self.fail(keyword, f"{name}'s arguments must be written out: {describe_arguments(make)}")
        hint = "."
        for key in parameters:
            for choice, inner in _choices(hints.get(key)).items():
                if keyword.arg == choice:
                    hint = f": write {key}={choice}(...)."
                elif keyword.arg in arguments_of(inner):
                    hint = f": write {key}={choice}({keyword.arg}=...)."
        if near := difflib.get_close_matches(keyword.arg, parameters, n=1, cutoff=0.5):
            hint = f", did you mean {near[0]!r}?" if hint == "." else hint
        listing = f"Its arguments: {describe_arguments(make)}" if parameters else "It takes none"
        self.fail(keyword, f"{name} has no argument {_short(keyword.arg)}{hint} {listing}", len(keyword.arg))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _choices(hint: Any) -> dict[str, Callable[..., Any]]:
    """What an argument of this type can be written as a call of, by name."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {name: make for option in options if hasattr(option, "choices") for name, make in option.choices().items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a parsed constant is of the annotated type. An int is accepted as a float, a bool as neither."""
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin is Literal:
        return any(value is choice or (value == choice and type(value) is type(choice)) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    return isinstance(value, hint if isinstance(hint, type) else object)


def _type_name(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if choices := _choices(hint):
        return " or ".join(
            f"{name}({arguments})" for name in choices if (arguments := describe_arguments(choices[name]))
        )
    return {float: "a number", int: "a whole number", bool: "True or False", str: "a string"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
