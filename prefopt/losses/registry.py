"""Names for losses: what `parse`, the command line and the docs table look objectives up by.

A project that imports prefopt adds its own with `@register("name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from prefopt.losses.base import Loss, constructor_arguments

L = TypeVar("L", bound=type[Loss])

_LOSSES: dict[str, type[Loss]] = {}


def register(name: str) -> Callable[[L], L]:
    """Class decorator that makes a loss known to `parse` and `available` under `name`.

    Raises:
        ValueError: if the name is not a lower-case identifier or already belongs to another class.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a loss name must be a lower-case Python identifier, got {name!r}")

    def add(cls: L) -> L:
        taken = _LOSSES.get(name)
        # A reloaded module defines its class anew; only a different class is a clash.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the loss name {name!r} already belongs to {taken.__module__}.{taken.__qualname__}")
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def available() -> dict[str, type[Loss]]:
    """Registered losses by name, in alphabetical order."""
    return dict(sorted(_LOSSES.items()))


def describe_arguments(cls: type[Loss]) -> str:
    """The hyperparameters and their defaults in one line: `beta=0.1, label_smoothing=0.0`."""
    return ", ".join(
        name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in constructor_arguments(cls).items()
    )
