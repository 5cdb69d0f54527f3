"""Pair builders: which of a prompt's scored completions become chosen and rejected, or rows of another kind.

A builder takes the candidates of one prompt and returns a `Choice`: the pairs, or one group, and counts of all that it
left out. It never guesses: two equal scores make no pair, whatever their order.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product
from typing import Any

from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Candidate:
    """A completion that may become a part of a pair.

    Attributes:
        index: among the samples of its prompt; -1 for a gold answer.
        completion: the text.
        score: higher is better; None if no judge gave one.
        token_count: of the completion; 0 if unknown.
        finished: False if the completion was cut.
        gold: whether it is the prompt's own answer, written by a person, instead of a sample.

    Raises:
        UsageError: for a score that is not a finite number.
    """

    index: int
    completion: str
    score: float | None
    token_count: int = 0
    finished: bool = True
    gold: bool = False

    def __post_init__(self) -> None:
        if self.score is None:
            return
        score = _finite(self.score)
        if score is None:
            raise UsageError(f"a score must be a finite number, or None for no score; got {self.score!r}"[:200])
        object.__setattr__(self, "score", score)


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected completion; for supervised training `rejected` is None.

    Attributes:
        chosen, rejected: the completions.
        why: the builder's reason, in words.
    """

    chosen: Candidate
    rejected: Candidate | None
    why: str

    @property
    def margin(self) -> float | None:
        """The difference of their scores; None if one has no score."""
        if self.rejected is None or self.chosen.score is None or self.rejected.score is None:
            return None
        return self.chosen.score - self.rejected.score


@dataclass
class Choice:
    """What a builder made of the candidates of one prompt.

    Attributes:
        pairs: the pairs.
        reason: why nothing was made; empty if there are pairs or a group.
        left_out: how many pairs or comparisons were left out, by reason.
        group: the completions of a row that keeps them all, with a score each; empty for builders of pairs.
    """

    pairs: list[Pair] = field(default_factory=list)
    reason: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    group: list[Candidate] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows of training they are."""
        return len(self.pairs) + bool(self.group)


Compare = Callable[[Candidate, Candidate], float | None]
"""How sure it is that the first is better: 1, 0, between them, 0.5 for a tie; None if the judge abstained."""

TIE = "tie"
SAME_TEXT = "same text"


@dataclass(frozen=True)
class Limits:
    """Which pairs may be used.

    Attributes:
        min_margin: the smallest difference of scores. A difference of 0 is a tie and never a pair.
        min_ratio: the smallest ratio of the scores, which must not be negative; 0 for any.
        max_length_ratio: the largest ratio of the lengths in tokens, the longer by the shorter; 0 for any.
    """

    min_margin: float = 0.0
    min_ratio: float = 0.0
    max_length_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_margin", "min_ratio", "max_length_ratio"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if 0 < self.max_length_ratio < 1:
            raise UsageError(f"max_length_ratio is the longer length by the shorter, so 1 or more, or 0 for any; "
                             f"got {self.max_length_ratio}")  # fmt: skip

    def refusal(self, chosen: Candidate, rejected: Candidate) -> str:
        """Why this pair may not be used; empty if it may."""
        if chosen.completion == rejected.completion:
            return SAME_TEXT
        if chosen.score is not None and rejected.score is not None:
            margin = chosen.score - rejected.score
            if margin == 0:
                return TIE
            if margin < self.min_margin:
                return f"margin below {self.min_margin:g}"
            if self.min_ratio and chosen.score < self.min_ratio * _not_negative(rejected.score):
                return f"ratio of scores below {self.min_ratio:g}"
        if self.max_length_ratio:
            short, long = sorted((_length(chosen), _length(rejected)))
            if long > self.max_length_ratio * short:
                return f"ratio of lengths above {self.max_length_ratio:g}"
        return ""


NO_LIMITS = Limits()

NO_SCORES = "fewer than two scored completions"
ALL_EQUAL = "all scores are equal"
NO_PAIR_ALLOWED = "no pair within the limits"
NONE_CORRECT = "none is correct"
ALL_CORRECT = "all are correct"


def best_worst(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS) -> Choice:
    """The completion with the highest score against the one with the lowest.

    With limits, the pair with the largest margin among those allowed. Among equal margins the first counts; where all
    scores are equal there is no pair.
    """
    scored = _scored(candidates)
    if len(scored) < 2:
        return Choice(reason=NO_SCORES)
    best, worst = max(scored, key=_score), min(scored, key=_score)
    if _score(best) == _score(worst):
        return Choice(reason=ALL_EQUAL, left_out=Counter({TIE: 1}))
    choice = Choice(reason=NO_PAIR_ALLOWED)
    ordered = sorted(
        ((a, b) for a, b in product(scored, scored) if _score(a) > _score(b)),
        key=lambda ab: _score(ab[1]) - _score(ab[0]),
    )
    for a, b in ordered:
        if not (refusal := limits.refusal(a, b)):
            why = "best against worst" if not choice.left_out else "largest margin within the limits"
            return Choice([Pair(a, b, why)], left_out=choice.left_out)
        choice.left_out[refusal] += 1
    return choice


def all_pairs(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS) -> Choice:
    """Every completion against every one with a lower score."""
    ordered = sorted(_scored(candidates), key=_score, reverse=True)
    if len(ordered) < 2:
        return Choice(reason=NO_SCORES)
    return _allowed(combinations(ordered, 2), limits, "higher against lower score")


def adjacent(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS) -> Choice:
    """Every completion against the next one in the order of their scores: one pair less than there are completions."""
    ordered = sorted(_scored(candidates), key=_score, reverse=True)
    if len(ordered) < 2:
        return Choice(reason=NO_SCORES)
    return _allowed(pairwise(ordered), limits, "neighbours in the order of scores")


def correct_incorrect(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS, correct_at: float = 0.5) -> Choice:
    """Every correct completion against every incorrect one. Gold answers are correct.

    Args:
        candidates: of one prompt.
        limits: on the pairs.
        correct_at: a score from which a completion is correct.
    """
    winners, losers, reason = _sides(candidates, correct_at)
    return Choice(reason=reason) if reason else _allowed(product(winners, losers), limits, "correct against incorrect")


def round_robin(
    candidates: Sequence[Candidate], limits: Limits = NO_LIMITS, pairs: int = 10, correct_at: float = 0.5,
    repeat: bool = True,
) -> Choice:  # fmt: skip
    """IRPO's pairs: the lists of correct and incorrect completions are walked at the same time up to `pairs` pairs.

    A list that ends is started again, so a completion, and a whole pair too, may come back. Gold answers stand at the
    end of the correct ones. Source: IRPO (arXiv 2404.19733), section 2.

    Args:
        candidates: of one prompt.
        limits: on the pairs. A pair that is not allowed is counted and its place stays empty, as in the paper, which
            drops pairs that are too long.
        pairs: of each prompt (K).
        correct_at: a score from which a completion is correct.
        repeat: whether the same pair may come back, as in the paper; False stops before.
    """
    pairs = _whole("round_robin", pairs)
    winners, losers, reason = _sides(candidates, correct_at)
    if reason:
        return Choice(reason=reason)
    walked = [(winners[number % len(winners)], losers[number % len(losers)]) for number in range(pairs)]
    different = list(dict.fromkeys(walked))
    choice = _allowed(walked if repeat else different, limits, "round robin of correct and incorrect")
    if len(different) < len(walked):
        choice.left_out["repeated pairs (used)" if repeat else "repeated pairs"] += len(walked) - len(different)
    return choice


def tournament(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS, compare: Compare | None = None) -> Choice:
    """INPO's tournament: of 8 completions the best against the worst, by 11 comparisons.

    Neighbours are compared first (4), then winners with winners to find the best (3) and losers with losers to find
    the worst (3); the last comparison is of the best with the worst, and the pair is used only if the best wins. In
    the comparisons before the last a tie counts for the first, as in the paper: it only decides who goes on. An odd
    completion goes on without a comparison. Source: INPO (arXiv 2407.00617), section 5.

    Args:
        candidates: of one prompt.
        limits: on the pair.
        compare: the judge; default: the higher score is better.
    """
    if compare is not None and (limits.min_margin or limits.min_ratio):
        raise UsageError("min_margin and min_ratio compare scores, and a judge of two completions gives none")
    samples = [one for one in candidates if not one.gold] if compare is not None else _scored(candidates)
    if len(samples) < 2:
        return Choice(reason=NO_SCORES if compare is None else "fewer than two completions")
    bracket = Bracket(compare or higher_score)
    winners, losers = bracket.split(samples)
    best, worst = bracket.last(winners, keep_winner=True), bracket.last(losers, keep_winner=False)
    if best is worst:
        return Choice(reason="the same completion came out best and worst", left_out=bracket.left_out)
    sure = bracket.ask(best, worst)
    if sure is None or sure <= 0.5:
        return Choice(reason="the best did not win against the worst", left_out=bracket.left_out)
    if refusal := limits.refusal(best, worst):
        bracket.left_out[refusal] += 1
        return Choice(reason=NO_PAIR_ALLOWED, left_out=bracket.left_out)
    return Choice([Pair(best, worst, "best against worst of a tournament")], left_out=bracket.left_out)


def random_pair(
    candidates: Sequence[Candidate], limits: Limits = NO_LIMITS, rng: random.Random | None = None
) -> Choice:
    """Two completions drawn at random; the one with the higher score is chosen.

    Args:
        candidates: of one prompt.
        limits: on the pair.
        rng: draws the two; default: `random.Random(0)`.
    """
    scored = _scored(candidates)
    if len(scored) < 2:
        return Choice(reason=NO_SCORES)
    better, worse = sorted((rng or random.Random(0)).sample(scored, 2), key=_score, reverse=True)
    choice = _allowed([(better, worse)], limits, "random two, by score")
    if choice.left_out[TIE]:
        choice.reason = "the two drawn have equal scores"
    return choice


def against_gold(candidates: Sequence[Candidate], limits: Limits = NO_LIMITS, pairs: int = 1) -> Choice:
    """SPIN's pairs: the gold answer against the model's own completions, which need no scores.

    Source: SPIN (arXiv 2401.01335), algorithm 1.

    Args:
        candidates: of one prompt, the gold answer among them.
        limits: on the pairs.
        pairs: of each prompt: the first so many completions.
    """
    pairs = _whole("against_gold", pairs)
    gold = [candidate for candidate in candidates if candidate.gold]
    own = [candidate for candidate in candidates if not candidate.gold]
    if not gold or not own:
        return Choice(reason="no gold answer" if not gold else "no completions")
    return _allowed([(gold[0], candidate) for candidate in own[:pairs]], limits, "gold answer against a sample")


def top_k(candidates: Sequence[Candidate], k: int = 1) -> Choice:
    """The k completions with the highest scores, as rows of supervised training (SuperHF).

    Where fewer than all are used and all scores are equal, the scores choose nothing and no row is used. Of several
    equal scores at the edge the first are used, and the tie is counted. Source: SuperHF (arXiv 2310.16763), section 3.
    """
    if k < 1:
        raise UsageError(f"top_k: k must be 1 or more, got {k}")
    scored = sorted(_scored(candidates), key=_score, reverse=True)  # stable: the first of equal ones stays first
    if not scored:
        return Choice(reason="no scored completion")
    left_out: Counter[str] = Counter()
    if k < len(scored):
        if _score(scored[0]) == _score(scored[-1]):
            return Choice(reason=ALL_EQUAL, left_out=Counter({TIE: 1}))
        left_out["tie at the edge"] += _score(scored[k - 1]) == _score(scored[k])
    rows = [Pair(candidate, None, f"best {k} of {len(scored)}") for candidate in scored[:k]]
    return Choice(rows, left_out=+left_out)


def groups(candidates: Sequence[Candidate], equal: bool = True) -> Choice:
    """All scored completions with their scores as one row, for losses on groups (GVPO, InfoNCA, Plackett-Luce, ...).

    Args:
        candidates: of one prompt.
        equal: whether a group whose scores are all equal is used. Losses that regress on scores pull its rewards
            together; to losses on the order it says nothing.
    """
    scored = _scored(candidates)
    if len(scored) < 2:
        return Choice(reason=NO_SCORES)
    if len({_score(one) for one in scored}) > 1:
        return Choice(group=scored)
    if equal:
        return Choice(group=scored, left_out=Counter({"tie of a whole group (used)": 1}))
    return Choice(reason=ALL_EQUAL, left_out=Counter({TIE: 1}))


def higher_score(first: Candidate, second: Candidate) -> float:
    """1 if the first has the higher score, 0 if the second has, 0.5 if they are equal."""
    return 0.5 if _score(first) == _score(second) else float(_score(first) > _score(second))


class Bracket:
    """Comparisons of a tournament, and counts of those without a winner."""

    def __init__(self, compare: Compare):
        self._compare = compare
        self.left_out: Counter[str] = Counter()

    def ask(self, first: Candidate, second: Candidate) -> float | None:
        sure = self._compare(first, second)
        if sure is None:
            self.left_out["comparison without an answer"] += 1
        elif (number := _finite(sure)) is None or not 0 <= number <= 1:
            raise UsageError(f"a comparison must give a number from 0 to 1, or None, got {sure!r}"[:200])
        elif sure == 0.5:
            self.left_out["comparison that is a tie"] += 1
        return sure

    def split(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Winners and losers of neighbours; an odd last one is among both."""
        winners, losers = [], []
        for first, second in zip(candidates[::2], candidates[1::2], strict=False):
            better, worse = self._ordered(first, second)
            winners.append(better)
            losers.append(worse)
        odd = [candidates[-1]] if len(candidates) % 2 else []
        return winners + odd, losers + odd

    def last(self, candidates: list[Candidate], keep_winner: bool) -> Candidate:
        """The one that wins (or loses) every comparison, by knock-out."""
        while len(candidates) > 1:
            winners, losers = self.split(candidates)
            candidates = winners if keep_winner else losers
        return candidates[0]

    def _ordered(self, first: Candidate, second: Candidate) -> tuple[Candidate, Candidate]:
        sure = self.ask(first, second)
        return (first, second) if sure is None or sure >= 0.5 else (second, first)


def _allowed(pairs: Iterator[tuple[Candidate, Candidate]] | Sequence[tuple[Candidate, Candidate]], limits: Limits,
             why: str) -> Choice:  # fmt: skip
    choice = Choice()
    for chosen, rejected in pairs:
        if refusal := limits.refusal(chosen, rejected):
            choice.left_out[refusal] += 1
        else:
            choice.pairs.append(Pair(chosen, rejected, why))
    choice.reason = "" if choice.pairs else NO_PAIR_ALLOWED
    return choice


def _sides(candidates: Sequence[Candidate], correct_at: float) -> tuple[list[Candidate], list[Candidate], str]:
    """Correct and incorrect completions, and why they make no pair."""
    scored = _scored(candidates)
    losers = [candidate for candidate in scored if _score(candidate) < correct_at]
    winners = [candidate for candidate in scored if _score(candidate) >= correct_at]
    winners += [candidate for candidate in candidates if candidate.gold]
    if not scored:
        return winners, losers, "no scored completion"
    return winners, losers, "" if winners and losers else NONE_CORRECT if losers else ALL_CORRECT


def _whole(builder: str, pairs: float) -> int:
    """The number of pairs, which is read as a decimal where an expression names it."""
    if pairs < 1 or pairs != int(pairs):
        raise UsageError(f"{builder}: pairs must be a whole number of 1 or more, got {pairs}")
    return int(pairs)


def _finite(value: Any) -> float | None:
    """A finite number, of NumPy or a tensor too; None for anything else."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _scored(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.score is not None and not candidate.gold]


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def _length(candidate: Candidate) -> int:
    if candidate.token_count < 1:
        raise UsageError("max_length_ratio compares lengths in tokens, but a sample has no token_count")
    return candidate.token_count


def _not_negative(score: float) -> float:
    if score < 0:
        raise UsageError(f"min_ratio compares scores by their ratio, but a score is ({score:g}): use min_margin")
    return score
