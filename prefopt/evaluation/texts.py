"""Measures of texts and tokens: how varied, how repetitive, how far from the reference."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

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


def meteor(first: Sequence[str], second: Sequence[str]) -> float:
    """METEOR of two texts by equal words alone, from 0 to 1: the first is measured against the second.

    Fmean = 10 P R / (R + 9 P), times 1 - (chunks / matches)^3 / 2, where a chunk is a run of matches in the same order
    in both. Each word matches the last free equal one, from the end on, as in nltk. Stems and synonyms, which need
    word lists to be downloaded, do not match: values are a little lower than nltk's.

    Args:
        first, second: words.

    Reference: Banerjee and Lavie 2005, "METEOR: An Automatic Metric for MT Evaluation".
    """
    places: dict[str, list[int]] = {}
    for place, word in enumerate(second):
        places.setdefault(word, []).append(place)
    matches = [(at, places[word].pop()) for at, word in reversed(list(enumerate(first))) if places.get(word)][::-1]
    if not matches:
        return 0.0
    steps = ((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(matches))
    chunks = 1 + sum(step != (1, 1) for step in steps)
    precision, recall = len(matches) / len(first), len(matches) / len(second)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def similarity(texts: Mapping[str, str], comparisons: int = 200, seed: int = 0) -> float | None:
    """SuperHF's watch for reward hacking: the mean METEOR of answers to different prompts, in both directions.

    It rises when a model begins to give every prompt the same answer. Compare sets of the same prompts.

    Args:
        texts: an answer to each prompt; split into words at spaces.
        comparisons: of two different prompts drawn at random.
        seed: of the draw.

    Returns:
        None for fewer than two prompts.

    Reference: Mukobi et al. 2023, arXiv 2310.16763; as openfeedback/superhf, src/superhf/utils.py, but for what
        `meteor` leaves out.
    """
    words = [text.split() for text in texts.values()]
    if len(words) < 2:
        return None
    draw = random.Random(seed)
    pairs = (draw.sample(range(len(words)), 2) for _ in range(comparisons))
    scores = [(meteor(words[a], words[b]) + meteor(words[b], words[a])) / 2 for a, b in pairs]
    return math.fsum(scores) / len(scores)


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
