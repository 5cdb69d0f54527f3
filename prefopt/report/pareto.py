"""Which points no other point beats in everything. Imports numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

_AT_ONCE = 256
"""Points compared with all others at once, which bounds the memory."""


def dominated(points: Any) -> Any:
    """(P,) bool, whether another of the (P, M) points is nowhere worse and somewhere better; more is better."""
    values = np.asarray(points, dtype=np.float64)
    mask = np.zeros(len(values), dtype=bool)
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE, None]
        no_worse = (values[None] >= part).all(-1)
        mask[start : start + _AT_ONCE] = (no_worse & (values[None] > part).any(-1)).any(-1)
    return mask
