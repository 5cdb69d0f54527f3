"""What sampled answers say: the best of several, where a greedy answer may say nothing."""

from __future__ import annotations

import math

import numpy as np

from prefopt.evaluation.arrays import Array, Floats, floats, whole
from prefopt.safety.errors import UsageError


def leak_at_k(scores: Array, k: int) -> Floats:
    """(N,) expected score of the best of k answers to each question, from n >= k sampled ones.

    With s_1 <= ... <= s_n, the mean of the largest of all subsets of k answers: sum_i C(i - 1, k - 1) / C(n, k) * s_i.
    It is an unbiased estimate of the expected maximum of k independent answers for any n >= k. For scores of 0 and 1
    it is pass@k. k = 1 gives the mean, k = n the maximum.

    Args:
        scores: (N, n) score of each answer: ROUGE-L recall, or 1 where it entails the true answer.
        k: how many answers an attacker draws.

    Raises:
        UsageError: for k below 1 or above n.

    Reference: Reisizadeh et al. 2025, arXiv 2511.04934 (leak@k); Chen et al. 2021, arXiv 2107.03374 (pass@k).
    """
    array = np.sort(floats("scores", scores, "N", "n"), axis=1)
    n, k = array.shape[1], whole("k", k)
    if not 1 <= k <= n:
        raise UsageError(f"k must be from 1 to the number of answers to a question ({n}), got {k}")
    shares = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])
    leaked: Floats = array @ shares
    return leaked
