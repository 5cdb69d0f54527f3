"""Checks of hyperparameters, so that a bad value fails at construction with the name of the argument."""

from __future__ import annotations

import math

from prefopt.losses.errors import LossError


def positive(name: str, value: float, most: float = math.inf) -> float:
    """`value` if it is a finite number in (0, most], else a ValueError that names the argument."""
    if not (_is_finite(name, value) and 0 < value <= most):
        limit = "" if math.isinf(most) else f" of at most {most:g}"
        raise LossError(f"{name} must be a positive finite number{limit}, got {value!r}")
    return value


def non_negative(name: str, value: float, most: float = math.inf, below: float = math.inf) -> float:
    """`value` if it is a finite number in [0, most] and less than `below`, else a ValueError that names it."""
    if not (_is_finite(name, value) and 0 <= value <= most and value < below):
        interval = f"[0, {below:g})" if below <= most and not math.isinf(below) else f"[0, {most:g}]"
        raise LossError(f"{name} must be a finite number in {interval}, got {value!r}")
    return value


def finite(name: str, value: float) -> float:
    """`value` if it is a finite number, else a ValueError that names the argument."""
    if not _is_finite(name, value):
        raise LossError(f"{name} must be a finite number, got {value!r}")
    return value


def whole(name: str, value: int, least: int = 0) -> int:
    """`value` if it is a whole number of at least `least`, else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LossError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _is_finite(name: str, value: float) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        raise LossError(f"{name} must be a number, got {value!r}") from None
