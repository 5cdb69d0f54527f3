"""From measured numbers to a verdict, and the interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from prefopt.report.intervals import over_seeds
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.paper import Check, Claim, PaperError

Verdict = Literal["holds", "partly", "does not hold", "cannot be run here", "error", "not run"]

Numbers = Mapping[str, Sequence[float]]


def verdict_of(claim: Claim, outcome: Outcome) -> Verdict:
    """What the numbers say about a claim.

    With rules, a claim holds if every rule holds in every seed, does not hold if no rule holds in any seed, and holds
    partly otherwise.

    Raises:
        PaperError: if a rule names a number that was not measured, or nothing decides.
    """
    if not claim.check:
        if outcome.holds is None:
            raise PaperError(f"claim {claim.id}: the experiment does not decide, and its file has no check")
        return "holds" if outcome.holds else "does not hold"
    shares = [_share(check, outcome.numbers, claim.id) for check in claim.check]
    if min(shares) == 1:
        return "holds"
    return "does not hold" if max(shares) == 0 else "partly"


def _share(check: Check, numbers: Numbers, claim: str) -> float:
    """The share of seeds in which a rule holds; NaN never does."""
    values, others = _values(check.number, numbers, claim), check.value
    against = _values(others, numbers, claim) if isinstance(others, str) else [float(others)]
    if check.of == "mean":
        values, against = [fmean(values)], [fmean(against)]
    if len(against) == 1:
        against = against * len(values)
    if len(against) != len(values):
        raise PaperError(f"claim {claim}: {check.number} has {len(values)} seeds, {check.value} has {len(against)}")
    return fmean(_agrees(check, value, other) for value, other in zip(values, against, strict=True))


def _values(name: str, numbers: Numbers, claim: str) -> list[float]:
    if not numbers.get(name):
        raise PaperError(f"claim {claim}: {name!r} was not measured, only {', '.join(numbers) or 'nothing'}")
    return list(numbers[name])


def _agrees(check: Check, value: float, other: float) -> bool:
    match check.rule:
        case "above":
            return value > other
        case "at_least":
            return value >= other
        case "below":
            return value < other
        case "at_most":
            return value <= other
        case _:
            return abs(value - other) <= check.within


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95% interval, by Student's t (two seeds and more).

    The interval is of the mean over seeds; it says nothing about other settings.
    """
    if (of_seeds := over_seeds(values)) is None:
        raise PaperError("an interval needs two seeds or more")
    return of_seeds.value, of_seeds.high - of_seeds.value


def spread(numbers: Numbers) -> str:
    """`name mean +- half width (n seeds)` for each number that has several seeds, or nothing."""
    parts = []
    for name, values in numbers.items():
        if len(values) > 1 and all(map(math.isfinite, values)):
            mean, half = interval(values)
            parts.append(f"{name} {mean:.3g} ± {half:.2g}")
    seeds = max((len(values) for values in numbers.values()), default=0)
    return f"{'; '.join(parts)} ({seeds} seeds)" if parts else ""
