"""Forget quality: can the unlearned model be told from one that never saw the forget set?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prefopt.evaluation.arrays import Array, Floats, floats
from prefopt.safety.errors import UsageError
from prefopt.unlearning.metrics.extra import required

SMALLEST = 1e-300
"""Below this, log10 p is computed from logarithms: p itself loses digits or becomes 0."""
EXACT = 10_000
"""Largest sample for which p is exact, as in scipy."""


@dataclass(frozen=True)
class ForgetQuality:
    """A two-sample Kolmogorov-Smirnov test of the truth ratios of two models.

    Attributes:
        p: probability of a distance this large if both models were alike; 0 where float64 cannot hold it. TOFU calls
            it the forget quality; above 0.05 the models cannot be told apart. Smaller samples make it larger.
        log10_p: its logarithm to base 10, always finite.
        statistic: largest distance between the two distribution functions, in [0, 1].
        samples: number of truth ratios of the unlearned model.
        gold_samples: number of those of the gold model.
    """

    p: float
    log10_p: float
    statistic: float
    samples: int
    gold_samples: int


def forget_quality(ratios: Array, gold_ratios: Array | None) -> ForgetQuality:
    """Compare the truth ratios of an unlearned model with those of the gold model on the same forget set.

    p is scipy's `ks_2samp` with its defaults: exact up to 10,000 rows, asymptotic beyond. Where p is below 1e-300,
    log10 p comes from the same exact count in logarithms; beyond 10,000 rows from Kolmogorov's leading term,
    2 exp(-2 D^2 n m / (n + m)). Any rising or falling function of the ratios, such as the logarithm, gives the same.

    Args:
        ratios: (N,) of `truth_ratio`, unlearned model.
        gold_ratios: (M,) of the model that was trained without the forget set.

    Raises:
        UsageError: without gold ratios: forget quality does not exist without a gold model.

    Reference: Maini et al. 2024 (TOFU), arXiv 2401.06121.
    """
    if gold_ratios is None:
        raise UsageError(
            "forget quality compares with a gold model, one trained without the forget set, and there is none: train "
            "it, or report the forget truth ratio instead"
        )
    ours = floats("ratios", ratios, "N", finite=False)
    gold = floats("gold_ratios", gold_ratios, "M", finite=False)
    stats = required("scipy.stats", "scipy", "forget quality")
    test = stats.ks_2samp(ours, gold)
    p, statistic = float(test.pvalue), float(test.statistic)
    log10_p = math.log10(p) if p > SMALLEST else _log_p(len(ours), len(gold), statistic) / math.log(10)
    return ForgetQuality(p, log10_p, statistic, len(ours), len(gold))


def _log_p(n: int, m: int, statistic: float) -> float:
    """log of the two-sided p of samples of n and m, at this distance of their distribution functions."""
    if max(n, m) > EXACT:
        return math.log(2) - 2 * statistic**2 * n * m / (n + m)
    return _log_p_exact(n, m, statistic)


def _log_p_exact(n: int, m: int, statistic: float) -> float:
    """Exact, from the chance that the merged sample, read in order, ever reaches the distance.

    Read in order, a merged sample is a random path from (0, 0) to (n, m). Of the paths to (i, j), a share i / (i + j)
    comes from (i - 1, j), the rest from (i, j - 1); a path that once reached the distance counts wherever it goes.
    All terms are positive, so in logarithms nothing cancels and nothing underflows.
    """
    n, m = sorted((n, m))
    common = math.lcm(n, m)
    reach = round(statistic * common)
    first = np.arange(n + 1)
    with np.errstate(divide="ignore"):
        logs = np.log(np.arange(n + m + 1))
    reached: Floats = np.full(n + 1, -np.inf if reach else 0.0)
    for total in range(1, n + m + 1):
        second = total - first
        from_second = logs[np.clip(second, 0, None)] + reached
        from_first = np.concatenate([[-np.inf], logs[1 : n + 1] + reached[:-1]])
        reached = np.logaddexp(from_first, from_second) - logs[total]
        outside = np.abs(first * (common // n) - second * (common // m)) >= reach
        reached[outside] = 0.0
        reached[(second < 0) | (second > m)] = -np.inf
    return float(reached[n])
