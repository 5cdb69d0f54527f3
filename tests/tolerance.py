"""How far apart rounding alone may leave two numbers, on any processor."""

from __future__ import annotations

import torch

SLACK = 4
"""Exponentials and logarithms are off by a few units in the last place, and by different ones on each processor."""


def rounding(largest: float, terms: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """An upper bound of what rounding changes in a sum: each term can be off by a few `eps` of the largest one.

    Args:
        largest: the largest absolute value that enters the computation, intermediate values included.
        terms: how many values are added up, or how many roundings follow one another.
        dtype: what is computed in.
    """
    return SLACK * torch.finfo(dtype).eps * largest * terms
