"""The YAML file of `--config`: read as data only, and every value checked against the option that it sets.

The command line's parser does the checking: a file is a command line written down. Errors name the file, and the line
or the option.
"""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from prefopt.safety.errors import did_you_mean
from prefopt.safety.redaction import redact, redacted

MAX_VALUES = 10_000
"""Maximum values in a config with its aliases expanded; real ones have about fifty."""


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a config file.

    Raises:
        SystemExit: naming the file, and the line if YAML reports one.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except UnicodeDecodeError as error:
        raise SystemExit(f"--config {path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    except yaml.YAMLError as error:
        lines = [line if len(line) <= 200 else f"{line[:200]}..." for line in str(error).splitlines()]
        raise SystemExit(redact("\n".join([f"--config {path}: not valid YAML: {lines[0]}", *lines[1:]]))) from None
    except RecursionError:
        raise SystemExit(f"--config {path}: nested too deeply; write one option per line, NAME: VALUE") from None
    except (ValueError, OverflowError) as error:  # a number or date that Python cannot hold
        raise SystemExit(f"--config {path}: a value cannot be read: {str(error)[:200]}. Shorten or quote it") from None
    except OSError as error:
        raise SystemExit(f"--config {path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(loaded, dict):
        raise SystemExit(f"--config {path}: must be a mapping of option names to values")
    if _count(loaded) > MAX_VALUES:
        raise SystemExit(
            f"--config {path}: its aliases (*name) expand to more than {MAX_VALUES} values: write the values "
            "themselves"
        )
    for name in ("env", "paper"):
        if not isinstance(loaded.get(name, {}), dict):
            raise SystemExit(f"--config {path}: {name!r} must be a mapping")
    return loaded


def set_environment(variables: Mapping[Any, Any], path: Path) -> None:
    """Set the environment variables of a config's `env`."""
    for name, value in variables.items():
        try:
            os.environ[name] = str(value)
        except (TypeError, ValueError, OSError) as error:
            shown = _shown(redacted(str(value), str(name)))
            raise SystemExit(f"--config {path}: env: {_shown(name)} cannot be set to {shown}: {error}") from None


def checked_values(
    config: Mapping[str, Any], parser: argparse.ArgumentParser, kinds: Iterable[type], path: Path | None
) -> dict[str, Any]:
    """A config's values, text converted as on a command line.

    Args:
        config: as `read_config` returns it.
        parser: of the command line.
        kinds: the dataclasses that the parser fills.
        path: of the config, for the message.

    Raises:
        SystemExit: for names that are not options, and values that the command line would not accept.
    """
    options: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest not in ("help", argparse.SUPPRESS):
            options.setdefault(action.dest, action)  # a --no_... form comes second
    hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    where, values = f"--config {path}", {}
    for name, value in config.items():
        if name not in options:
            raise SystemExit(f"{where}: there is no option {str(name)[:80]!r}.{did_you_mean(str(name)[:80], options)}")
        option, hint = options[name], hints.get(name, str)
        try:
            values[name] = _read_as_words(parser, option, hint, value)
        except (argparse.ArgumentError, TypeError, ValueError, OverflowError):
            wanted = f"one of {', '.join(_choices(option))}" if option.choices is not None else _words(hint)
            quotes = ' (YAML reads no as false: write "no")' if value is False and "no" in _choices(option) else ""
            raise SystemExit(
                f"{where}: {name}: must be {wanted}, got {_shown(redacted(value, name))}{quotes}"
            ) from None
    return values


def _read_as_words(parser: argparse.ArgumentParser, option: argparse.Action, hint: Any, value: Any) -> Any:
    """Have argparse read a value as words of a command line. Null, mappings and lists have no such form and must be of
    the option's type.
    """
    if value is None or isinstance(value, (dict, list)):
        if not isinstance(value, tuple(_kinds(hint))):
            raise TypeError
        if not isinstance(value, list):
            return value
    items = value if isinstance(value, list) else [value]
    if option.type is str and not all(isinstance(item, str) for item in items):
        raise TypeError  # YAML does not read 0123, 1e3 and no as text
    words = [str(item) for item in items]
    if option.nargs in ("+", "*"):
        return parser._get_values(option, words)
    read = [parser._get_values(option, [word]) for word in words]
    return read if isinstance(value, list) else read[0]


def _kinds(hint: Any) -> set[type]:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {kind for choice in choices if isinstance(kind := get_origin(choice) or choice, type)}


def _choices(option: argparse.Action) -> list[str]:
    return [str(getattr(choice, "value", choice)) for choice in option.choices or ()]


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(choice) for choice in get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each item {_words((get_args(hint) or (Any,))[0])}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}
    names |= {dict: "a mapping", list: "a list"}
    return names.get(get_origin(hint) or hint, "a value of its kind")


def _shown(value: Any) -> str:
    """A value in few characters; `repr` would expand nested aliases."""
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _count(value: Any) -> int:
    """The number of values in a nested structure, aliases expanded; counting stops once there are too many."""
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
    """Plain YAML values only, and no option twice: YAML would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping", node.start_mark, f"found {key.value!r} twice", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
