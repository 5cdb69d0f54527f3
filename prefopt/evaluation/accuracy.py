"""Measures of answers that are right or wrong, several a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from prefopt.evaluation.arrays import whole
from prefopt.safety.errors import UsageError


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of the probability that at least one of k samples is right.

    1 - C(n - c, k) / C(n, k), as a product, so that no binomial overflows.

    Args:
        n: samples of a prompt.
        correct: how many of them are right (c).
        k: at most n.

    Raises:
        UsageError: for numbers that are not whole or out of range; of several prompts, take the mean of their values.

    Reference: Chen et al. 2021 (Codex), arXiv 2107.03374, equation 1.
    """
    n, correct, k = whole("n", n), whole("correct", correct), whole("k", k)
    if not 1 <= k <= n:
        raise UsageError(f"k must be at least 1 and at most n, got k={k}, n={n}")
    if not 0 <= correct <= n:
        raise UsageError(f"correct must be at least 0 and at most n, got {correct} of {n}")
    all_wrong = 1.0
    for drawn in range(k):
        all_wrong *= max(n - correct - drawn, 0) / (n - drawn)
    return 1 - all_wrong


def majority_vote(answers: Sequence[Hashable | None]) -> Hashable | None:
    """The most frequent answer; the earliest of several; None does not vote, and wins where nobody does.

    Reference: Wang et al. 2022 (self-consistency), arXiv 2203.11171.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    # A Counter keeps the order of first votes, and the first of equals is the most common one.
    return votes.most_common(1)[0][0] if votes else None
