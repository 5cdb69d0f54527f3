"""Bootstrap intervals: how much a measure depends on which rows were asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.evaluation.arrays import Array, floats
from prefopt.report.intervals import bootstrap_ends
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval.

    Attributes:
        value: the measure on the rows themselves.
        low: lower end.
        high: upper end.
        level: share of resamples between the ends.
    """

    value: float
    low: float
    high: float
    level: float


def share(values: Array, *, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
    """A mean over rows and its interval: `bootstrap`, but for rows that are all 0 or all 1.

    Every resample of those is the same, so a bootstrap would be certain after two rows. They get the exact interval of
    a share that came out as 0 or 1: 0 of 20 right is compatible with 0.17.

    Args:
        values: (N,) at least two rows.
        level: in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Reference: Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404.
    """
    rows = floats("values", values, "N")
    one = bootstrap(np.mean, rows, level=level, resamples=resamples, seed=seed)
    if one.low != one.high or one.value not in (0.0, 1.0):
        return one
    away = 1 - ((1 - level) / 2) ** (1 / len(rows))
    return Interval(one.value, max(0.0, one.value - away), min(1.0, one.value + away), level)


def bootstrap(
    statistic: Callable[..., Any], *samples: Array, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile interval of a measure, over samples redrawn with replacement.

    `bootstrap(np.mean, probabilities)`; `bootstrap(membership_auc, forget_scores, holdout_scores)`. Values that belong
    to the same rows go in one sample as columns, so that a row stays whole: `bootstrap(utility, retain, authors,
    facts)` with (N, 3) arrays of probability, ROUGE and truth ratio.

    Args:
        statistic: function of the samples, as arrays, that returns a number.
        samples: (N, ...) each, at least two rows; every sample is redrawn on its own, by rows.
        level: in (0, 1).
        resamples: how often.
        seed: the same seed gives the same interval.

    Reference: Efron 1979, doi 10.1214/aos/1176344552.
    """
    if not 0 < level < 1:
        raise UsageError(f"level must be in (0, 1), got {level}")
    if resamples < 1:
        raise UsageError(f"resamples must be at least 1, got {resamples}")
    if not samples:
        raise UsageError("a bootstrap needs at least one sample")
    arrays = []
    for number, sample in enumerate(samples):
        array = floats(f"sample {number}", sample, "N", "...", finite=False)
        if len(array) < 2:
            raise UsageError(f"a bootstrap needs at least two rows, sample {number} has one")
        arrays.append(array)
    low, high = bootstrap_ends(statistic, arrays, level, resamples, seed)
    if math.isnan(low):
        raise UsageError("the statistic of a resample is NaN; it must be a number for any choice of rows")
    return Interval(float(statistic(*arrays)), low, high, level)
