"""What the metrics accept: lists, NumPy arrays and tensors, checked and turned into NumPy arrays. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt.safety.errors import UsageError

Floats = NDArray[np.float64]
Array = Sequence[Any] | NDArray[Any] | torch.Tensor | float

ROUNDING = 1e-3
"""A log-probability may exceed 0 by this much: half precision rounds."""


def floats(name: str, values: Array, *shape: str, finite: bool = True) -> Floats:
    """The values in float64.

    Args:
        name: of the argument, for errors.
        values: with one letter of `shape` for each dimension.
        shape: the names of the dimensions, for errors; a last "..." stands for any further ones.
        finite: whether infinite values are refused too.

    Raises:
        UsageError: for another number of dimensions, no values, or NaN.
    """
    array = _as_array(name, values)
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{name} must hold numbers, got an array of {array.dtype}")
    array = array.astype(np.float64)
    _check_shape(name, array.shape, shape)
    bad = ~np.isfinite(array) if finite else np.isnan(array)
    if bad.any():
        raise UsageError(
            f"{name} {_place(bad)} is {array[bad][0]}: a model whose weights or logits are not finite gives this"
        )
    return array


def logps(name: str, values: Array, *shape: str) -> Floats:
    """Log-probabilities: finite, and at most 0; what rounding put above it is 0."""
    array = floats(name, values, *shape)
    above = array > ROUNDING
    if above.any():
        raise UsageError(
            f"{name} {_place(above)} is {array[above][0]:.4g}, but log-probabilities are at most 0: negate losses"
        )
    return np.minimum(array, 0)


def token_ids(name: str, values: Array) -> NDArray[np.int64]:
    """(T,) token ids."""
    array = _as_array(name, values)
    _check_shape(name, array.shape, ("T",))
    if array.dtype.kind not in "iu":
        raise UsageError(f"{name} must hold token ids (integers), got an array of {array.dtype}")
    return array.astype(np.int64)


def whole(name: str, value: Any) -> int:
    """One whole number; of a float, an array or a tensor only if it is one.

    Raises:
        UsageError: for anything else.
    """
    number = floats(name, value)
    if number != number // 1:
        raise UsageError(f"{name} must be a whole number, got {value}")
    return int(number)


def text_list(name: str, values: Sequence[str]) -> Sequence[str]:
    """Several texts: one text is a sequence of letters, which is not what is meant.

    Raises:
        UsageError: for one text, or something among them that is not a text.
    """
    if isinstance(values, str):
        raise UsageError(f"{name} must be a list of texts, not one text")
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise UsageError(f"{name}, number {number}, must be a text, not a {type(value).__name__}")
    return values


def same_length(**arrays: NDArray[Any]) -> None:
    """Refuses arrays that differ in the length of their first dimension."""
    if len({len(array) for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise UsageError(f"different lengths: {sizes}")


def _as_array(name: str, values: Array) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        return np.asarray((values.double() if values.is_floating_point() else values).numpy())
    if isinstance(values, (list, tuple)) and any(isinstance(value, torch.Tensor) for value in values):
        values = [value.detach().cpu().tolist() if isinstance(value, torch.Tensor) else value for value in values]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UsageError(f"{name} must be a rectangular array, its rows differ in length") from error


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[str, ...]) -> None:
    wanted = f"({', '.join(expected)}{',' if len(expected) == 1 else ''})"
    if 0 in shape:
        raise UsageError(f"{name} is empty; it must have shape {wanted}")
    further = expected[-1:] == ("...",) and len(shape) >= len(expected) - 1
    if len(shape) != len(expected) and not further:
        raise UsageError(f"{name} must have shape {wanted}, got {shape}")


def _place(where: NDArray[np.bool_]) -> str:
    return f"at {', '.join(str(int(i)) for i in np.argwhere(where)[0])}" if where.ndim else "it"
