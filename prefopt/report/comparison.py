"""What a comparison of runs says: a table with intervals, the best run or that there is none, and pairs that flipped.

Only what means the same for every loss is compared, never a loss's own value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prefopt.report.folder import RunFolder, ends_in_nan, number
from prefopt.report.intervals import Interval, over_rows, over_seeds, sign_test
from prefopt.report.runs import ACCURACY, MEASURES, OF_CURVES, Group, Measure, held_out

_ROW_VALUES = {
    "accuracy": "rewards/margins",
    "margin": "ratios/margins",
    "chosen": "ratios/chosen",
    "rejected": "ratios/rejected",
}
"""The values of held-out rows that a measure is the mean of."""
_FLIPS_SHOWN = 8


@dataclass(frozen=True)
class Cell:
    """A measure of one group: its mean over seeds, its interval, and the difference from the best group."""

    measure: Measure
    value: float
    interval: Interval | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class Flips:
    """Held-out pairs that one run ranks correctly and the other wrongly.

    Attributes:
        better, other: labels of the two groups.
        gained: pairs that `better` alone ranks correctly.
        lost: pairs that `other` alone ranks correctly.
        rows: how many were compared.
        probability: of a split at least this uneven if both were equally good.
        shown: the rows with the largest difference: row, texts, both margins.
    """

    better: str
    other: str
    gained: int
    lost: int
    rows: int
    probability: float
    shown: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The comparison.

    Attributes:
        groups: that are compared.
        best: the first by `decided_by`; None if no measure decides, or the runs are not comparable.
        decided_by: the measure.
        verdict: in words.
        cautions: why runs may not be comparable.
        cells: by group, then by measure.
        flips: between the best group and each other one.
        tied: groups whose mean by `decided_by` is that of the best.
    """

    groups: list[Group]
    best: Group | None
    decided_by: Measure | None
    verdict: str
    cautions: list[str]
    cells: list[list[Cell]]
    flips: list[Flips]
    tied: Sequence[Group] = ()


def compare(groups: Sequence[Group]) -> Comparison:
    """Compare groups of runs."""
    cautions, comparable = _cautions(groups)
    decided_by = next(
        (measure for measure in MEASURES if measure.decides and all(group.values(measure) for group in groups)), None
    )
    best = max(groups, key=lambda group: _mean(group, decided_by)) if decided_by and comparable else None
    others = [group for group in groups if group is not best]
    # The best is the largest of several: each difference from it has a share of the five percent.
    level = 1 - 0.05 / max(len(others), 1)
    cells = [_cells(group, best, level) for group in groups]
    tied: list[Group] = []
    if best is None or decided_by is None:
        verdict = _no_verdict(groups, comparable)
    else:
        tied = [one for one in others if math.isclose(_mean(one, decided_by), _mean(best, decided_by), rel_tol=1e-9)]
        verdict = _verdict(best, tied, [one for one in others if one not in tied], decided_by, level)
    flips = [flip for group in others if best is not None and (flip := flips_of(best, group)) is not None]
    return Comparison(list(groups), best, decided_by, verdict, cautions, cells, flips, tied)


def _mean(group: Group, measure: Measure) -> float:
    values = group.values(measure)
    return sum(values.values()) / len(values)


def _cells(group: Group, best: Group | None, level: float) -> list[Cell]:
    cells = []
    for measure in MEASURES:
        values = group.values(measure)
        if not values:
            continue
        difference = None if best is None or group is best else difference_of(best, group, measure, level)
        cells.append(Cell(measure, _mean(group, measure), over_seeds(list(values.values())), difference))
    return cells


def difference_of(first: Group, second: Group, measure: Measure, level: float) -> Interval | None:
    """First minus second: paired by seed and by held-out row, the wider end of the two; None without either."""
    a, b = first.values(measure), second.values(measure)
    seeds = [seed for seed in a if seed in b and seed is not None]
    rows = _row_differences(first, second, measure, seeds)
    by_row = None if rows is None else over_rows(rows, level)
    if len(seeds) < 2 or (by_seed := over_seeds([a[seed] - b[seed] for seed in seeds], level)) is None:
        return by_row
    if by_row is None:
        return by_seed
    # Accuracies of a few rows are often the same for every seed, which says nothing of other rows.
    return replace(by_seed, low=min(by_seed.low, by_row.low), high=max(by_seed.high, by_row.high))


# ---- rows --------------------------------------------------------------------------------------------------------


def _row_differences(first: Group, second: Group, measure: Measure, seeds: Sequence[Any]) -> Any:
    """(N,) differences by held-out row, their mean over seeds; None if a run has no values, or of other rows."""
    pairs = [(first.runs[seed], second.runs[seed]) for seed in seeds] or [(first.first, second.first)]
    by_seed = []
    for one, other in pairs:
        if (rows := _rows_of_sweep(one, other, measure.key)) is not None:
            by_seed.append(rows[0] - rows[1])
        elif (rows := _rows_of_both(one, other, _ROW_VALUES.get(measure.key, ""))) is not None:
            a, b = rows
            by_seed.append((a > 0) * 1.0 - (b > 0) if measure.key == "accuracy" else a - b)
        else:
            return None
    alike = len({len(one) for one in by_seed}) == 1 and _same_rows([one for one, _ in pairs])
    return np.mean(by_seed, axis=0) if alike else None


def _same_rows(runs: Sequence[RunFolder]) -> bool:
    """Whether runs of several seeds have the same held-out rows."""
    return len({str(run.pairs.get("fingerprint") or _fingerprint(run, "held-out")) for run in runs}) == 1


def _one_seed(first: Group, second: Group) -> tuple[RunFolder, RunFolder]:
    """The runs of a seed that both have, else the first of each."""
    seed = next((seed for seed in first.runs if seed in second.runs), None)
    return first.runs.get(seed, first.first), second.runs.get(seed, second.first)


def _rows_of_both(first: RunFolder, second: RunFolder, name: str) -> tuple[Any, Any] | None:
    """(N,) values of the same held-out rows of two runs; None if one has none, or they are other rows."""
    stored = [first.pairs, second.pairs]
    if not stored[0].get("fingerprint") or stored[0].get("fingerprint") != stored[1].get("fingerprint"):
        return None
    values = [_values(pairs, name) for pairs in stored]
    if any(one is None for one in values) or len(values[0]) != len(values[1]):
        return None
    return values[0], values[1]


def _rows_of_sweep(first: RunFolder, second: RunFolder, measure: str) -> tuple[Any, Any] | None:
    """(N,) values of the held-out pairs of two runs of a sweep; None for other runs."""
    columns = [rows.get(measure) for run in (first, second) if isinstance(rows := run.sweep.get("rows"), dict)]
    if len(columns) < 2 or any(not isinstance(column, list) for column in columns):
        return None
    one, other = (np.asarray(column, dtype=np.float64) for column in columns)
    return (one, other) if len(one) == len(other) else None


def _values(pairs: Any, name: str) -> Any:
    columns = pairs.get("values")
    if not isinstance(columns, dict):
        return None
    if name == "ratios/margins" and "ratios/chosen" in columns and "ratios/rejected" in columns:
        return _values(pairs, "ratios/chosen") - _values(pairs, "ratios/rejected")
    return np.asarray(columns[name], dtype=np.float64) if isinstance(columns.get(name), list) else None


def flips_of(better: Group, other: Group) -> Flips | None:
    """The pairs that two runs rank differently: by log-ratios in a sweep, else each by the reward of its own loss."""
    runs = _one_seed(better, other)
    rows = _rows_of_sweep(*runs, "margin") or _rows_of_both(*runs, "rewards/margins")
    if rows is None:
        return None
    one, two = rows
    gained, lost = (one > 0) & (two <= 0), (one <= 0) & (two > 0)
    texts = runs[0].pairs.get("texts")
    # Rewards of two losses have two scales.
    distance = np.abs(one / (np.std(one) or 1) - two / (np.std(two) or 1))
    places = [int(place) for place in np.argsort(-distance) if gained[place] or lost[place]][:_FLIPS_SHOWN]
    shown = [
        {
            "row": place,
            "better_margin": float(one[place]),
            "other_margin": float(two[place]),
            **(
                texts[place]
                if isinstance(texts, list) and place < len(texts) and isinstance(texts[place], dict)
                else {}
            ),
        }
        for place in places
    ]
    counts = int(gained.sum()), int(lost.sum())
    return Flips(better.label, other.label, *counts, len(one), sign_test(*counts), shown)


# ---- words -------------------------------------------------------------------------------------------------------


def _verdict(best: Group, tied: Sequence[Group], others: Sequence[Group], measure: Measure, level: float) -> str:
    if not others and not tied:
        return f"There is one setting, {best.label}; runs of another are needed to compare it with."
    names = " and ".join(group.label for group in (best, *tied))
    value = f"held-out {measure.label}, {_mean(best, measure):{measure.form}}"
    if not others:
        return f"{names} have the same {value}, so it does not tell them apart."
    behind: list[str] = []
    alike: list[str] = []
    unknown: list[str] = []
    for group in others:
        interval = difference_of(best, group, measure, level)
        if interval is None:
            unknown.append(group.label)
        else:
            words = f"{group.label} ({shown(interval, measure)})"
            (alike if interval.has_zero else behind).append(words)
    it = best.label if tied else "It"
    parts = [f"{names} {'have' if tied else 'has'} the highest {value}"]
    if behind:
        parts.append(f"{it} is better than {'; '.join(behind)}")
    if alike:
        parts.append(f"{it} cannot be told apart from {'; '.join(alike)}: the interval of the difference holds zero")
    if unknown:
        parts.append(
            f"Whether the difference to {'; '.join(unknown)} is more than chance is unknown: there is one run of "
            "each, and no values of the same held-out rows"
        )
    compared = len(others) + len(tied)
    if compared > 1 and (behind or alike):
        parts.append(f"Each interval is at {100 * level:.4g}%, so that all {compared} hold together at 95%")
    return ". ".join(parts) + "."


def _no_verdict(groups: Sequence[Group], comparable: bool) -> str:
    if not comparable:
        return "These runs cannot be compared; the table shows their numbers side by side."
    without = ", ".join(group.label for group in groups if not group.values(ACCURACY))
    return (
        f"No measure that every run has says which is better. Without held-out accuracy: {without}. It needs an "
        "evaluation on held-out pairs, and a loss with rewards."
    )


def shown(interval: Interval, measure: Measure) -> str:
    """A difference in the units of a measure: `+2.4% [-1.0%, +5.8%] over 3 seeds`."""
    form = measure.form if measure.form.startswith("+") else f"+{measure.form}"
    ends = f"[{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.value:{form}} {ends} over {interval.count} {interval.over}"


def _cautions(groups: Sequence[Group]) -> tuple[list[str], bool]:
    """What stands against a comparison, and whether it can be made at all."""
    cautions, comparable = [], True
    runs = [(seed, run) for group in groups for seed, run in group.runs.items()]
    bases = {str(run.facts.get("base_digest") or run.facts.get("base_model")) for _, run in runs if run.facts}
    if len(bases) > 1:
        cautions.append(f"The runs started from different models: {', '.join(sorted(_names(runs)))}.")
        comparable = False
    if _rows_differ(groups, "held-out"):
        cautions.append(
            "The runs were evaluated on different held-out rows: their fingerprints differ. A test split, or one "
            "--data_seed for all, gives runs of different seeds the same rows."
        )
        comparable = False
    if _rows_differ(groups, "training"):
        cautions.append("The runs were trained on different rows: what differs may be due to the data.")
    named = [(name, run) for group in groups for name, run in zip(group.names, group.runs.values(), strict=True)]
    cautions += [line for name, run in named for line in _ends_early(name, run)]
    cautions += [line for name, run in named for line in _evaluated_early(name, run)]
    cautions += [f"{name}: {', '.join(run.unread)}: not read." for name, run in named if run.unread]
    for (one, run), (other, again) in itertools.combinations(named, 2):
        if run.curves and run.curves == again.curves:
            cautions.append(f"{one} and {other} logged the same numbers: they may be one run, copied or repeated.")
    if silent := [name for name, run in named if not run.facts and not run.unread]:
        cautions.append(
            f"No run.json in {', '.join(silent)}: whether data and base model were the same is not known from there."
        )
    if any(len(group.runs) == 1 for group in groups):
        cautions.append("Of some settings there is one run: intervals over rows do not say how much a seed changes.")
    return cautions, comparable


def _ends_early(name: str, run: RunFolder) -> list[str]:
    """A run that ended before its last step, as its log says."""
    if "not_finite" in run.log:
        return [f"{name} ended with a number that is NaN or infinite: its measures are of an earlier step."]
    done, planned = number(run.log.get("global_step")), number(run.log.get("max_steps"))
    if done is None or planned is None or done >= planned:
        return []
    return [f"{name} ended after step {done:g} of {planned:g}."]


def _evaluated_early(name: str, run: RunFolder) -> list[str]:
    """A run whose last evaluation with numbers is not its last one, or came long before its last step."""
    curves = [curve for key in OF_CURVES.values() if (curve := held_out(run, key)) is not None]
    if not curves:
        return []
    at = min(curve.steps[-1] for curve in curves)
    if any(map(ends_in_nan, curves)):
        if "not_finite" in run.log:  # said already
            return []
        return [f"{name}: later evaluations are NaN or infinite: what is compared is of step {at}."]
    steps = [0, *curves[0].steps]
    usual = max(later - earlier for earlier, later in itertools.pairwise(steps))
    if run.last_step - at <= usual:
        return []
    return [f"{name} was last evaluated at step {at}, and logged until step {run.last_step}."]


def _rows_differ(groups: Sequence[Group], role: str) -> bool:
    """Whether two groups have other rows at a seed that both have; without a common seed, whether they share none."""
    by_seed = [
        {seed: rows for seed, run in group.runs.items() if (rows := _fingerprint(run, role)) is not None}
        for group in groups
    ]
    for one, other in itertools.combinations(by_seed, 2):
        common = one.keys() & other.keys()
        if any(one[seed] != other[seed] for seed in common):
            return True
        if one and other and not common and not set(one.values()) & set(other.values()):
            return True
    return False


def _names(runs: Sequence[tuple[Any, Any]]) -> set[str]:
    return {str(run.facts.get("base_model") or run.name) for _, run in runs}


def _fingerprint(run: Any, role: str) -> str | None:
    data = run.facts.get("data")
    for part in data if isinstance(data, list) else ():
        if isinstance(part, dict) and str(part.get("role", "")).startswith(role) and part.get("fingerprint"):
            return str(part["fingerprint"])
    return None
