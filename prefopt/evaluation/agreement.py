"""What a file of judgements says about its judges: failures, agreement, position bias, length bias."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefopt.evaluation.judgements import Judgement, Preference, Score, preferences_by_prompt
from prefopt.generation.samples import Sample

Pair = tuple[int, str, int, int]
"""Two samples: their round, prompt id, lower and higher index."""

Orders = dict[Pair, int]
"""For pairs of samples: 1 if the lower index is better, -1 if the higher one is, 0 for a tie."""


@dataclass(frozen=True)
class JudgeSummary:
    """One judge's part of a file.

    Attributes:
        judge: its name.
        kind: `score` or `preference`.
        judged: how many judgements have a score, a winner or a tie.
        missing: how many have none, by reason; of errors, the kind of error.
        mean_score: of a judge that scores; None without scores.
        ties: of a judge that compares: the share of ties.
        tied_pairs: share of the pairs of one prompt's samples that are equally good.
        first_wins: of the decided comparisons, the share won by the completion shown first; 0.5 has no position bias.
        consistent: of the pairs decided in both orders, the share with the same winner.
        length_tau: Kendall's tau-b between quality and length, over pairs of one prompt's samples; above 0 longer
            completions are preferred.
        longer_wins: of the pairs that the judge orders and whose lengths differ, the share in which the longer wins.
    """

    judge: str
    kind: str
    judged: int
    missing: Mapping[str, int]
    mean_score: float | None
    ties: float | None
    tied_pairs: float | None
    first_wins: float | None
    consistent: float | None
    length_tau: float | None
    longer_wins: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Two judges on the pairs of samples that both ordered (better, worse or tied).

    Attributes:
        judges: their names.
        pairs: how many pairs both judged.
        same: share of pairs that they order in the same way.
        kappa: Cohen's kappa of these orders; None where both always say the same one thing. Reference: Cohen 1960,
            doi 10.1177/001316446002000104.
        tau: Kendall's tau-b over the pairs; None where a judge has nothing but ties.
    """

    judges: tuple[str, str]
    pairs: int
    same: float
    kappa: float | None
    tau: float | None


def summarize(judgements: Iterable[Judgement], samples: Iterable[Sample] = ()) -> list[JudgeSummary]:
    """Numbers of each judge, in the order of the file; the lengths come from the samples.

    Lengths are in tokens; in characters if a sample has no token count.
    """
    by_judge: dict[str, list[Judgement]] = {}
    for one in judgements:
        by_judge.setdefault(one.judge, []).append(one)
    lengths = _lengths(samples)
    return [_summary(judge, of_judge, lengths) for judge, of_judge in by_judge.items()]


def _summary(judge: str, judgements: Sequence[Judgement], lengths: Mapping[tuple[int, str, int], int]) -> JudgeSummary:
    scores = [one for one in judgements if isinstance(one, Score)]
    preferences = [one for one in judgements if isinstance(one, Preference)]
    numbers = [one.score for one in scores if one.score is not None]
    shares = [one.first_share for one in preferences if one.first_share is not None]
    decided = [share > 0.5 for share in shares if share != 0.5]
    orders = orders_of(judgements)
    longer = _longer(orders, lengths)
    missing = Counter(short_reason(one.reason) for one in judgements if _is_missing(one))
    return JudgeSummary(
        judge=judge,
        kind="score" if scores else "preference",
        judged=len(numbers) + len(shares),
        missing=dict(missing.most_common()),
        mean_score=_mean(numbers),
        ties=_mean([share == 0.5 for share in shares]),
        tied_pairs=_mean([order == 0 for order in orders.values()]),
        first_wins=_mean(decided),
        consistent=_consistent(preferences),
        length_tau=tau_b(orders, longer),
        longer_wins=_mean([orders[pair] == order for pair, order in longer.items() if orders[pair] and order]),
    )


def agreements(judgements: Sequence[Judgement]) -> list[Agreement]:
    """Every two judges of a file that ordered the same pairs of samples."""
    judges = list(dict.fromkeys(one.judge for one in judgements))
    orders = {judge: orders_of(one for one in judgements if one.judge == judge) for judge in judges}
    results = []
    for left, right in itertools.combinations(judges, 2):
        both = [pair for pair in orders[left] if pair in orders[right]]
        if both:
            a, b = ([orders[judge][pair] for pair in both] for judge in (left, right))
            same = sum(x == y for x, y in zip(a, b, strict=True)) / len(both)
            results.append(
                Agreement((left, right), len(both), same, cohen_kappa(a, b), tau_b(orders[left], orders[right]))
            )
    return results


def orders_of(judgements: Iterable[Judgement]) -> Orders:
    """How one judge orders the pairs of samples: by their scores, or by its choices over both orders and repeats."""
    scores: dict[tuple[int, str], dict[int, float]] = {}
    preferences: dict[int, list[Judgement]] = {}
    for one in judgements:
        if isinstance(one, Preference):
            preferences.setdefault(one.round, []).append(one)
        elif one.score is not None:
            scores.setdefault((one.round, one.prompt_id), {})[one.index] = one.score
    orders: Orders = {}
    for (number, prompt), of_prompt in scores.items():
        for low, high in itertools.combinations(sorted(of_prompt), 2):
            orders[number, prompt, low, high] = _sign(of_prompt[low] - of_prompt[high])
    for number, of_round in preferences.items():
        for prompt, shares in preferences_by_prompt(of_round).items():
            for (low, high), share in shares.items():
                orders[number, prompt, low, high] = _sign(share - 0.5)
    return orders


def cohen_kappa(left: Sequence[int], right: Sequence[int]) -> float | None:
    """Agreement beyond chance of two lists of labels: (observed - expected) / (1 - expected).

    None where agreement is certain by chance: both have one and the same label everywhere.
    """
    count = len(left)
    observed = sum(a == b for a, b in zip(left, right, strict=True)) / count
    of_left, of_right = Counter(left), Counter(right)
    expected = sum(of_left[label] * of_right[label] for label in of_left) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def tau_b(left: Orders, right: Orders) -> float | None:
    """Kendall's tau-b over the pairs that both have: concordant minus discordant, over the root of the product of how
    many pairs each does not tie. None where one of them ties all.
    """
    both = [(left[pair], right[pair]) for pair in left if pair in right]
    untied = math.sqrt(sum(a != 0 for a, _ in both) * sum(b != 0 for _, b in both))
    return sum(a * b for a, b in both) / untied if untied else None


def _consistent(preferences: Sequence[Preference]) -> float | None:
    winners: dict[tuple[object, ...], dict[int, int]] = {}
    for one in preferences:
        share = one.first_share
        if share is not None and share != 0.5:
            key = (one.round, one.prompt_id, *sorted(one.indices), one.repeat)
            winners.setdefault(key, {})[one.order] = one.indices[0] if share > 0.5 else one.indices[1]
    return _mean([len(set(by_order.values())) == 1 for by_order in winners.values() if len(by_order) == 2])


def _longer(pairs: Iterable[Pair], lengths: Mapping[tuple[int, str, int], int]) -> Orders:
    """Which sample of a pair is longer, as in `Orders`; pairs without lengths are left out."""
    longer: Orders = {}
    for number, prompt, low, high in pairs:
        if (number, prompt, low) in lengths and (number, prompt, high) in lengths:
            longer[number, prompt, low, high] = _sign(lengths[number, prompt, low] - lengths[number, prompt, high])
    return longer


def _lengths(samples: Iterable[Sample]) -> dict[tuple[int, str, int], int]:
    listed = list(samples)
    in_tokens = all(sample.token_count for sample in listed)
    return {
        (one.round, one.prompt_id, one.index): one.token_count if in_tokens else len(one.completion) for one in listed
    }


def _is_missing(one: Judgement) -> bool:
    return one.score is None if isinstance(one, Score) else one.first_share is None


def short_reason(reason: str) -> str:
    """Of "raised: ValueError: bad", "raised: ValueError"; of "not a number: nan", "not a number"."""
    parts = reason.split(": ")
    return ": ".join(parts[:2]) if parts[0] == "raised" else parts[0] or "no reason"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
