"""TRL's loss options on a recipe with its own objective: each sets the argument of its name, or is refused.

A recipe whose objective is TRL's default uses TRL's options as TRL does. Reads expressions with `ast`; makes a loss
only to check that the expression it wrote can be parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from trl import DPOConfig

from prefopt.losses import LossSyntaxError, parse
from prefopt.losses.registry import arguments_of, makers
from prefopt.safety.errors import UsageError
from prefopt.trainer.config import DIVERGENCES, TRL_LOSS_OPTIONS, expression_from_trl_options

_OTHER_NAMES = {
    "discopop_tau": ("discopop", "tau"),
    "ld_alpha": ("ld_dpo", "alpha"),
    "f_divergence_type": ("f_dpo", "divergence"),
    "f_alpha_divergence_coef": ("f_dpo", "alpha"),
}
"""Options whose argument has another name here: the loss and its argument."""

_ASKS_NOTHING = {
    "label_smoothing": 0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "loss_weights": None,
}
"""Options and the value that turns them off, for configs that list every option."""


def settle(own: str, written: str | None, options: Mapping[str, Any]) -> str | None:
    """The recipe's objective under TRL's loss options.

    Args:
        own: the recipe's expression.
        written: the expression in `--loss` or a config; None if there is none.
        options: the options of `TRL_LOSS_OPTIONS` on the command line or in the config, with their values.

    Returns:
        The expression to train, or None if TRL's options alone choose the objective.

    Raises:
        SystemExit: naming the option that would have no effect, and the `--loss` to pass.
    """
    assert set(options) <= set(TRL_LOSS_OPTIONS)
    try:
        objective = str(parse(own if written is None else written))
        if written is None and objective == str(parse("dpo(beta=0.1)")):
            return None
    except LossSyntaxError:
        return written  # the error is raised where the options are read
    if written is not None:
        _refuse_beside(written, options)
        return written
    # Arguments named in the expression come first: a preset's argument may also decide its weights.
    for option in sorted(options, key=lambda name: (name != "loss_type", not _places(_tree(own), name))):
        own = _with_option(own, option, options[option], options)
    return own


def _refuse_beside(written: str, options: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if _asks_nothing(option, value):
            continue
        try:
            instead = _set(written, option, value)
        except ValueError:
            instead = written
        raise SystemExit(
            f"{option}={value} would have no effect beside a loss expression: write hyperparameters inside it, as in "
            f'--loss "{instead}"'
            if instead != written
            else f"{option}={value} would have no effect beside a loss expression, here {written}: leave one out"
        )


def _with_option(own: str, option: str, value: Any, options: Mapping[str, Any]) -> str:
    for text in (own, str(parse(own))):  # a preset may lack an argument that one of its terms has
        if _places(_tree(text), option):
            try:
                changed = _set(text, option, value)
                parse(changed)
            except ValueError as error:
                raise SystemExit(f"--{option} {value}: {error}") from None
            return changed
    if _asks_nothing(option, value):
        return own
    raise SystemExit(_no_place(own, option, value, options))


def _no_place(own: str, option: str, value: Any, options: Mapping[str, Any]) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    if option == "loss_type":
        trls = _trls_expression(options)
        line = f'pass --loss "{trls}"' if trls else "use recipes/dpo.py"
        return f"--loss_type {shown} would train another objective than this recipe's {own}. If you want it, {line}"
    return (
        f"--{option} {shown} would have no effect: this recipe trains {parse(own)}, which has no such argument. Leave "
        f'it out, or write the whole objective yourself, as in --loss "{own}"'
    )


def _trls_expression(options: Mapping[str, Any]) -> str | None:
    try:
        args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)
        return str(parse(expression)) if (expression := expression_from_trl_options(args)) else None
    except (ValueError, TypeError, NotImplementedError):
        return None


def _asks_nothing(option: str, value: Any) -> bool:
    return option in _ASKS_NOTHING and value == _ASKS_NOTHING[option]


# ---- expressions -------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tree(text: str) -> ast.expr:
    return ast.parse(_one_line(text), mode="eval").body


def _places(tree: ast.expr, option: str) -> list[tuple[ast.expr, str]]:
    """The losses of an expression that have an option's argument, and its name in them."""
    losses = makers()
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    places: list[tuple[ast.expr, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Call, ast.Name)):
            continue
        name = node.func if isinstance(node, ast.Call) else node
        if not isinstance(name, ast.Name) or id(node) in called or name.id not in losses:
            continue
        loss, other = _OTHER_NAMES.get(option, (None, None))
        arguments = arguments_of(losses[name.id])
        argument = other if name.id == loss else option
        if argument in arguments:
            places.append((node, argument))
    return places


def _set(text: str, option: str, value: Any) -> str:
    """The expression with an option's argument set to a value.

    Raises:
        ValueError: if no loss in it has the argument, or more than one.
    """
    tree = _tree(text)
    places = _places(tree, option)
    if len(places) != 1:
        terms = " and ".join(ast.unparse(node) for node, _ in places)
        raise UsageError(
            f"{len(places)} losses of {text} have this argument"
            + (f': {terms}. Set it in the one you mean: --loss "{text}"' if places else "")
        )
    node, argument = places[0]
    if option == "f_divergence_type":
        value = DIVERGENCES.get(value, value)
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func
    assert isinstance(name, ast.Name)
    position = list(arguments_of(makers()[name.id])).index(argument)
    written = ast.parse(repr(value), mode="eval").body
    if position < len(call.args):
        call.args[position] = written
    else:
        others = [word for word in call.keywords if word.arg != argument]
        call.keywords = [*others, ast.keyword(arg=argument, value=written)]
    raw = _one_line(text).encode()  # positions count bytes
    return (raw[: node.col_offset] + ast.unparse(call).encode() + raw[node.end_col_offset :]).decode()
