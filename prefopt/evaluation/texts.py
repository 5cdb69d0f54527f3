"""Measures of texts and tokens: how varied, how repetitive, how far from the reference."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from prefopt.evaluation.arrays import Array, Floats, floats, same_length
from prefopt.safety.errors import UsageError

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and signs of a text, in small letters."""
    return _WORD.findall(text.casefold())


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share of the n-grams of all texts that are distinct; 0 if there is none.

    It falls as texts get more, so compare sets of one size.

    Args:
        texts: each a sequence of words or token ids.
        n: at least 1.

    Reference: Li et al. 2016, arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of a sequence's n-grams that occurred before in it: 1 - distinct / all; 0 for fewer than n tokens.

    Args:
        tokens: words or token ids.
        n: at least 1.

    Reference: Welleck et al. 2020, arXiv 1908.04319 (seq-rep-n).
    """
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise UsageError(f"n must be at least 1, got {n}")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def sampled_kl(logps: Array, ref_logps: Array) -> Floats:
    """(N,) unbiased estimates of KL(policy || reference) per completion, in nats: log p - log p_ref of each sample.

    Their mean is the KL; single values may be negative. The completions must be the policy's own samples, drawn at
    temperature 1 from all tokens.

    Args:
        logps: (N,) log-probabilities of the completions under the policy, summed over tokens.
        ref_logps: (N,) the same under the reference.
    """
    policy, reference = floats("logps", logps, "N"), floats("ref_logps", ref_logps, "N")
    same_length(logps=policy, ref_logps=reference)
    difference: Floats = policy - reference
    return difference
