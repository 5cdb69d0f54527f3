"""Names of losses, for `parse`, the command line and the docs table.

A project that imports prefopt adds its own with `@register("name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from prefopt.losses.base import Loss, arguments_of
from prefopt.losses.errors import LossError

__all__ = ["Preset", "arguments_of", "available", "describe_arguments", "makers", "preset", "presets", "register"]

L = TypeVar("L", bound=type[Loss])


@dataclass(frozen=True)
class Preset:
    """A named sum of losses.

    Attributes:
        name: its name in an expression.
        build: makes the loss from the preset's arguments, all of which have defaults.
        paper: arXiv id of the source.
    """

    name: str
    build: Callable[..., Loss]
    paper: str


_LOSSES: dict[str, type[Loss]] = {}
_PRESETS: dict[str, Preset] = {}


def register(name: str) -> Callable[[L], L]:
    """Class decorator that makes a loss known to `parse` and `available` under `name`.

    Raises:
        LossError: if the name is not a lower-case identifier or already belongs to another class or a preset.
    """
    _check_name(name)

    def add(cls: L) -> L:
        if name in _PRESETS:
            raise LossError(f"the loss name {name!r} already belongs to a preset")
        taken = _LOSSES.get(name)
        # A reloaded module defines its class again; only a different class is a clash.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise LossError(f"the loss name {name!r} already belongs to {taken.__module__}.{taken.__qualname__}")
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def preset(name: str, paper: str = "") -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Decorator that makes a function returning a loss known to `parse` and `presets` under `name`.

    Raises:
        LossError: if the name is not a lower-case identifier or already belongs to a loss or another preset.
    """
    _check_name(name)

    def add(build: Callable[..., Loss]) -> Callable[..., Loss]:
        if name in _LOSSES:
            raise LossError(f"the name {name!r} already belongs to a loss")
        taken = _PRESETS[name].build if name in _PRESETS else None
        if taken is not None and (taken.__module__, taken.__qualname__) != (build.__module__, build.__qualname__):
            raise LossError(f"the name {name!r} already belongs to the preset {taken.__module__}.{taken.__qualname__}")
        _PRESETS[name] = Preset(name, build, paper)
        return build

    return add


def presets() -> dict[str, Preset]:
    """Registered presets by name, in alphabetical order."""
    return dict(sorted(_PRESETS.items()))


def _check_name(name: str) -> None:
    if not name.isidentifier() or name != name.lower():
        raise LossError(f"a loss name must be a lower-case Python identifier, got {name!r}")


def available() -> dict[str, type[Loss]]:
    """Registered losses by name, in alphabetical order."""
    return dict(sorted(_LOSSES.items()))


def makers() -> dict[str, Callable[..., Loss]]:
    """What makes each loss and preset from its arguments, by name."""
    return {**available(), **{name: preset.build for name, preset in presets().items()}}


def describe_arguments(make: Callable[..., Any]) -> str:
    """The arguments of a loss class, or of what builds a preset, and their defaults in one line: `beta=0.1, f='x'`."""
    return ", ".join(
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in arguments_of(make).items()
    )
