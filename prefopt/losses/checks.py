"""Checks of hyperparameters, so that a bad value fails where it is written and names the argument."""

from __future__ import annotations

import math


def positive(name: str, value: float) -> float:
    """`value` if it is a finite number above zero, else a ValueError that names the argument."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return value


def non_negative(name: str, value: float, most: float = math.inf) -> float:
    """`value` if it is a finite number in [0, most], else a ValueError that names the argument."""
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"{name} must be a finite number in [0, {most:g}], got {value!r}")
    return value


def finite(name: str, value: float) -> float:
    """`value` if it is a finite number, else a ValueError that names the argument."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value
