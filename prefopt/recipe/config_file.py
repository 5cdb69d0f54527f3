"""The YAML file behind `--config`: read as data only, and every value checked against the option that it sets.

argparse converts and checks the words of a command line, but takes a file's values as they are; what it would let
through is refused here, with the file, the line or the option. Imports yaml and the parser's own actions.
"""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from prefopt.safety.errors import did_you_mean
from prefopt.safety.redaction import redact, redacted

MAX_VALUES = 10_000
"""Most values that a config may hold once its aliases are written out; real ones hold about fifty."""


def read_config(path: Path) -> dict[str, Any]:
    """The mapping that a config file holds.

    Raises:
        SystemExit: naming the file, and the line where YAML knows it.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"--config {path}: byte {error.start} is not UTF-8 text: save the file in the encoding UTF-8"
        ) from None
    except yaml.YAMLError as error:
        lines = [line if len(line) <= 200 else f"{line[:200]}..." for line in str(error).splitlines()]
        raise SystemExit(redact("\n".join([f"--config {path}: not valid YAML: {lines[0]}", *lines[1:]]))) from None
    except RecursionError:
        raise SystemExit(f"--config {path}: nested too deeply; options are written one a line, NAME: VALUE") from None
    except (ValueError, OverflowError) as error:  # a number or date that Python cannot hold
        raise SystemExit(f"--config {path}: a value cannot be read: {str(error)[:200]}. Shorten or quote it") from None
    except OSError as error:
        raise SystemExit(f"--config {path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(loaded, dict):
        raise SystemExit(f"--config {path}: must be a mapping of option names to values")
    if _count(loaded) > MAX_VALUES:
        raise SystemExit(
            f"--config {path}: its aliases (*name) write out to more than {MAX_VALUES} values: write the values "
            "themselves"
        )
    for name in ("env", "paper"):
        if not isinstance(loaded.get(name, {}), dict):
            raise SystemExit(f"--config {path}: {name!r} must be a mapping")
    return loaded


def set_environment(variables: Mapping[Any, Any], path: Path) -> None:
    """Put a config's `env` into effect."""
    for name, value in variables.items():
        try:
            os.environ[name] = str(value)
        except (TypeError, ValueError, OSError) as error:
            shown = _shown(redacted(str(value), str(name)))
            raise SystemExit(f"--config {path}: env: {_shown(name)} cannot be set to {shown}: {error}") from None


def check_values(
    config: Mapping[str, Any], actions: Iterable[argparse.Action], kinds: Iterable[type], path: Path | None
) -> None:
    """Refuse names that are no option, and values that their options cannot have.

    Args:
        config: of `read_config`.
        actions: the parser's.
        kinds: the dataclasses that the parser fills.
        path: of the config, for the message.
    """
    options: dict[str, argparse.Action] = {}
    for action in actions:
        if action.dest not in ("help", argparse.SUPPRESS):
            options.setdefault(action.dest, action)  # a --no_... form comes second
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    where = f"--config {path}" if path is not None else "--config"
    for name, value in config.items():
        if name not in options:
            raise SystemExit(f"{where}: there is no option {str(name)[:80]!r}.{did_you_mean(str(name)[:80], options)}")
        option, hint = options[name], hints.get(name, Any)
        if isinstance(value, str) and callable(option.type) and option.nargs not in ("+", "*"):
            reason = _refusal(option.type, value, hint)
        else:
            reason = None if _fits(value, hint) else f"must be {_words(hint)}"
        if reason is None and option.choices is not None and value is not None:
            choices = [getattr(choice, "value", choice) for choice in option.choices]
            if not all(item in choices for item in (value if isinstance(value, list) else [value])):
                reason = f"must be one of {', '.join(map(str, choices))}"
        if reason is not None:
            raise SystemExit(f"{where}: {name}: {reason}, got {_shown(redacted(value, name))}")


def _refusal(convert: Callable[[str], Any], value: str, hint: Any) -> str | None:
    """Why argparse would refuse a word, or None."""
    try:
        convert(value)
    except (argparse.ArgumentTypeError, TypeError, ValueError, OverflowError):
        return f"must be {_words(convert if convert in (int, float) else hint)}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that YAML made is of an option's annotated type; text stands for what argparse makes of it."""
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if origin is typing.Literal:
        return value in get_args(hint)
    if isinstance(value, str):
        # argparse converts a word; not the words of a list, where a lone one may stand for a list of text.
        if origin is list:
            return _fits(value, get_args(hint)[0])
        return hint not in (list, dict, NoneType, int, float, bool) and origin is not dict
    if origin is list or hint is list:
        inner = (get_args(hint) or (Any,))[0]
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, NoneType):
        return isinstance(value, hint)
    # What is left holds text (names, paths, enumerations); for a class of its own YAML has no value but a mapping.
    return hint is not str and isinstance(value, dict)


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(choice) for choice in get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each item {_words((get_args(hint) or (Any,))[0])}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}
    names |= {dict: "a mapping", list: "a list"}
    return names.get(get_origin(hint) or hint, "a value of its kind")


def _shown(value: Any) -> str:
    """A value in few characters; `repr` of nested aliases would write them all out."""
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _count(value: Any) -> int:
    """Values in a nested structure, aliases written out; counting stops once there are too many."""
    count, left = 0, [value]
    while left and count <= MAX_VALUES:
        item = left.pop()
        count += 1
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            left.extend(item)
    return count


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML values only, and no option twice: YAML would let the last one win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping", node.start_mark, f"found {key.value!r} twice", key.start_mark
                    )
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made
