"""The power law that fits the tail of a sample best. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TAIL = 10
"""Values of a tail: the exponent's standard error is then a third of alpha - 1."""


@dataclass(frozen=True)
class PowerLaw:
    """A density proportional to x^-alpha for x >= smallest.

    Attributes:
        alpha: the exponent; its standard error is (alpha - 1) / sqrt(tail).
        smallest: where the tail begins.
        tail: how many values are in it.
        distance: Kolmogorov-Smirnov distance between the tail and the law.
    """

    alpha: float
    smallest: float
    tail: int
    distance: float


def fit_power_law(values: Tensor) -> PowerLaw | None:
    """Fit a tail by maximum likelihood, where it begins by the smallest Kolmogorov-Smirnov distance.

    Args:
        values: (N,) positive numbers in any order; zeros and below are left out.

    Returns:
        None for fewer than `LEAST_TAIL` + 1 different values.

    Reference: Clauset, Shalizi, Newman 2009, arXiv 0706.1062, equations 3.1 and 3.9.
    """
    ordered = values.detach().double().cpu().flatten()
    ordered = ordered[ordered > 0].sort().values
    starts = len(ordered) - LEAST_TAIL
    if starts < 1 or bool(ordered[0] == ordered[-1]):
        return None
    logs = ordered.log()
    counts = torch.arange(len(ordered), 0, -1, dtype=torch.float64)
    above = logs.flip(0).cumsum(0).flip(0) - counts * logs  # sum of log(x / x_min) over each tail
    alphas = 1 + counts / above.clamp(min=1e-12)
    best: PowerLaw | None = None
    for start in range(starts):
        if ordered[start] == ordered[start - 1] and start:
            continue  # a tail begins with the first of equal values
        alpha, tail = float(alphas[start]), len(ordered) - start
        law = 1 - torch.exp((1 - alpha) * (logs[start:] - logs[start]))
        steps = torch.arange(tail, dtype=torch.float64) / tail
        distance = float(torch.maximum((law - steps).abs(), (law - steps - 1 / tail).abs()).max())
        if best is None or distance < best.distance:
            best = PowerLaw(alpha, float(ordered[start]), tail, distance)
    return best
