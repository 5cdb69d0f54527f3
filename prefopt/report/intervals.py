"""Intervals of paired differences: over seeds, or over rows where there is one run each. Imports numpy alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value between two ends.

    Attributes:
        value: the mean.
        low, high: the ends.
        level: how often such an interval covers the true mean.
        over: what varies: "seeds" or "rows".
        count: of these.
    """

    value: float
    low: float
    high: float
    level: float
    over: str
    count: int

    @property
    def has_zero(self) -> bool:
        return self.low <= 0 <= self.high


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's t interval of a mean, for differences by seed; None for fewer than two.

    A bootstrap of three or five values covers far less often than it says; Student's interval does not.
    """
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_quantile(0.5 + level / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, level, "seeds", count)


def over_rows(differences: Any, level: float = 0.95, seed: int = 0) -> Interval | None:
    """Percentile interval of the mean of (N,) differences by row, rows redrawn with replacement; None for one row.

    With few rows that differ, a bootstrap is surer than it may be: four rows that one run alone has right are left out
    of less than 2.5% of the resamples, and have probability 1/8 if both runs are equally good. So the interval holds
    zero unless a sign test excludes it too: of the split, where all differences have one size, and else of the least
    even split of as many.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return None
    low, high = bootstrap_ends(np.mean, [values], level, _RESAMPLES, seed)
    gained, lost = int((values > 0).sum()), int((values < 0).sum())
    one_size = np.ptp(np.abs(values[values != 0])) < 1e-12 if gained + lost else True
    if sign_test(*((gained, lost) if one_size else (gained + lost, 0))) > 1 - level:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(float(values.mean()), low, high, level, "rows", len(values))


def bootstrap_ends(
    statistic: Callable[..., Any], samples: Sequence[Any], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The ends of a percentile interval of a measure; NaN if the measure of a resample is NaN.

    Args:
        statistic: function of the samples that returns a number.
        samples: (N, ...) arrays; every one is redrawn on its own, by rows, with replacement.
        level: share of resamples between the ends.
        resamples: how often.
        seed: of the draws.

    Reference: Efron 1979, doi 10.1214/aos/1176344552.
    """
    generator = np.random.default_rng(seed)
    values = [
        float(statistic(*(sample[generator.integers(len(sample), size=len(sample))] for sample in samples)))
        for _ in range(resamples)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@functools.cache
def student_quantile(share: float, freedom: int) -> float:
    """The value below which this share of Student's t distribution lies, to four digits.

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle)^(freedom - 1).
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, below / below[-1], angles)))


def sign_test(gained: int, lost: int) -> float:
    """Two-sided probability of a split at least this uneven where both are equally likely (McNemar's exact test)."""
    count = gained + lost
    if not count:
        return 1.0
    if count > 2000:  # exact sums take long, and the normal distribution is as good
        return math.erfc(max(abs(gained - lost) - 1, 0) / math.sqrt(2 * count))
    tail: float = sum(math.comb(count, wins) for wins in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)
