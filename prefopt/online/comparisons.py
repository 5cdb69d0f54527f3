"""Which comparisons a judge of two completions is asked for: those that the pair builder needs."""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.evaluation.judgements import Preference
from prefopt.evaluation.stage import Comparisons, Pairing
from prefopt.generation.samples import Sample
from prefopt.online.pairing import PairSettings, judged, same_candidate, unusable
from prefopt.online.pairs import Bracket, Candidate, Compare


def comparisons_of(settings: PairSettings) -> Comparisons:
    """The comparisons that a round's pairs need: of a tournament its own, for other builders all pairs."""
    return TournamentComparisons(settings) if settings.builder.name == "tournament" else Pairing()


class TournamentComparisons:
    """The comparisons of `tournament`, level by level: 11 of 8 samples, instead of 28.

    Args:
        settings: how samples become pairs: which of them take part, and the judges' weights.
    """

    def __init__(self, settings: PairSettings):
        self._settings = settings

    def pairs(self, group: Sequence[Sample], earlier: Sequence[Preference]) -> list[tuple[Sample, Sample]]:
        """The comparisons of the next level."""
        asked = {(min(one.indices), max(one.indices)) for one in earlier}
        known = judged(earlier, group, self._settings.weights).compare(group[0].prompt_id)

        def compare(first: Candidate, second: Candidate) -> float | None:
            if (first.index, second.index) not in asked and (second.index, first.index) not in asked:
                raise LookupError
            return None if known is None else known(first, second)

        samples = {sample.index: sample for sample in group}
        named = next_comparisons(self._candidates(group), compare)
        return [(samples[min(pair)], samples[max(pair)]) for pair in ((a.index, b.index) for a, b in named)]

    def _candidates(self, group: Sequence[Sample]) -> list[Candidate]:
        """As the stage that pairs has them: of samples that are merged, the first."""
        candidates: dict[int | str, Candidate] = {}
        for sample in group:
            if not unusable(sample, self._settings):
                one = Candidate(sample.index, sample.completion, None, sample.token_count, sample.finished)
                candidates.setdefault(same_candidate(sample, self._settings), one)
        return list(candidates.values())


def next_comparisons(candidates: Sequence[Candidate], compare: Compare) -> list[tuple[Candidate, Candidate]]:
    """The comparisons that a tournament needs next; none if it has all.

    Args:
        candidates: of one prompt, in the order of the tournament.
        compare: the answers so far; raises LookupError for a comparison that was not asked yet.
    """
    missing: list[tuple[Candidate, Candidate]] = []

    def answer(first: Candidate, second: Candidate) -> float | None:
        try:
            return compare(first, second)
        except LookupError:
            missing.append((first, second))
            return None

    def last(side: list[Candidate], keep: int) -> Candidate:
        before = len(missing)
        while len(side) > 1 and len(missing) == before:
            side = bracket.split(side)[keep]
        return side[0]

    if len(candidates) < 2:
        return []
    bracket = Bracket(answer)
    winners, losers = bracket.split(candidates)
    if missing:
        return missing
    best, worst = last(winners, 0), last(losers, 1)  # both sides ask for their next level at the same time
    if not missing and best is not worst:
        answer(best, worst)
    return missing
