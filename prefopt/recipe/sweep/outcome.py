"""What a sweep found: the order of its trials, the best one, and which others cannot be told apart from it.

Imports no model code: reads what the runs left in their folders.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.recipe.sweep.plan import SweepPlan, shown
from prefopt.recipe.sweep.trial import RunResult
from prefopt.report.intervals import over_rows, over_seeds
from prefopt.report.pareto import dominated

SCHEMA = "prefopt.sweep/1"
LEVEL = 0.95


@dataclass(frozen=True)
class Tried:
    """A setting and its runs.

    Attributes:
        number: of the trial.
        setting: the values of the axes.
        state: `finished`, `pruned`, `failed`, `running` or `waiting`.
        message: why it failed or stopped.
        runs: one per seed, as far as they got.
    """

    number: int
    setting: Mapping[str, Any]
    state: str
    message: str
    runs: tuple[RunResult, ...]

    def mean(self, measure: str) -> float:
        """Over the seeds; NaN without a run."""
        values = [run.measures[measure] for run in self.runs if measure in run.measures]
        return float(np.mean(values)) if values else float("nan")

    def rows(self, measure: str) -> np.ndarray[Any, Any]:
        """(S, N) of S seeds and N held-out pairs."""
        return np.array([run.rows[measure] for run in self.runs])


@dataclass(frozen=True)
class Difference:
    """How much better the best trial is than another, by the first measure; above 0 it is better.

    Attributes:
        trial: the other one's number.
        value: of the means.
        low, high: the interval.
        told_apart: whether the interval excludes 0.
    """

    trial: int
    value: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        return self.low > 0


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep.

    Attributes:
        plan: of the sweep.
        trials: all of them, in order of their numbers.
        best: the best finished one by the first measure, ties by the next ones, then by the number; None if all
            failed.
        differences: to each other finished trial, smallest first.
        front: with several measures, the trials that no other one is at least as good as in all of them and better in
            one.
    """

    plan: SweepPlan
    trials: Sequence[Tried]
    best: Tried | None
    differences: Sequence[Difference]
    front: Sequence[int]

    @property
    def close(self) -> list[int]:
        """Trials that cannot be told apart from the best."""
        return [difference.trial for difference in self.differences if not difference.told_apart]


def outcome_of(plan: SweepPlan, trials: Sequence[Tried]) -> Outcome:
    """Rank the finished trials."""
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        return Outcome(plan, trials, None, (), ())
    best = min(finished, key=lambda trial: (*_costs(plan, trial), trial.number))
    others = [trial for trial in finished if trial is not best]
    measure, direction = next(iter(plan.measures.items()))
    sign = 1 if direction == "maximize" else -1
    # As many intervals as there are other trials: together they have the level (Bonferroni).
    level = 1 - (1 - LEVEL) / max(len(others), 1)
    differences = [_difference(best, other, measure, sign, level) for other in others]
    behind = dominated([[-cost for cost in _costs(plan, trial)] for trial in finished])
    front = [trial.number for trial, is_behind in zip(finished, behind, strict=True) if not is_behind]
    return Outcome(plan, trials, best, sorted(differences, key=lambda one: one.value), front)


def _costs(plan: SweepPlan, trial: Tried) -> tuple[float, ...]:
    """The measures, turned so that less is better."""
    return tuple(trial.mean(name) * (-1 if way == "maximize" else 1) for name, way in plan.measures.items())


def _difference(best: Tried, other: Tried, measure: str, sign: int, level: float) -> Difference:
    """The paired interval: over held-out pairs, and over seeds where there are several; the wider end of the two."""
    ours, theirs = best.rows(measure), other.rows(measure)
    if ours.shape != theirs.shape:  # the held-out rows were drawn anew for each seed
        by_seed = sign * (np.array([row.mean() for row in ours]) - np.array([row.mean() for row in theirs]))
        by_row = None
    else:
        paired = sign * (ours - theirs)
        by_seed, by_row = paired.mean(1), paired.mean(0)
    value = float(by_seed.mean())
    intervals = (over_seeds(by_seed.tolist(), level), None if by_row is None else over_rows(by_row, level))
    ends = [(one.low, one.high) for one in intervals if one is not None] or [(value, value)]
    return Difference(other.number, value, min(low for low, _ in ends), max(high for _, high in ends))


# ---- in words, and as files ----------------------------------------------------------------------------------------


def verdict(outcome: Outcome) -> list[str]:
    """What the sweep found, in a few sentences."""
    best, plan = outcome.best, outcome.plan
    if best is None:
        return ["No trial finished, so there is no best one."]
    measure = next(iter(plan.measures))
    rows, seeds = len(best.runs[0].rows[measure]), len(best.runs)
    basis = f"{rows} held-out pairs" + (f", {seeds} seeds" if seeds > 1 else "")
    lines = [f"Best by {measure}: trial {best.number} ({shown(best.setting)}), {best.mean(measure):.4g} on {basis}."]
    if not outcome.differences:
        return lines
    equal = [one.trial for one in outcome.differences if math.isclose(one.value, 0, abs_tol=1e-12)]
    if equal:
        lines.append(f"{_trials(equal)} {'have' if len(equal) > 1 else 'has'} the same {measure}.")
    for nearest in [one for one in outcome.differences if one.trial not in equal][:1]:
        interval = f"{nearest.value:.3g} ({nearest.low:.3g} to {nearest.high:.3g}"
        lines.append(f"Ahead of trial {nearest.trial} by {interval}, {LEVEL:.0%} over all comparisons with the best).")
    close = outcome.close
    if not close:
        lines.append("It can be told apart from every other trial.")
    elif len(close) == len(outcome.differences):
        lines.append("It cannot be told apart from any other trial: take the order as chance.")
    else:
        lines.append(f"It cannot be told apart from {_trials(close).lower()}.")
    if seeds == 1:
        lines.append("One seed: the interval is over held-out pairs alone. seeds: 3 or more shows chance in training.")
    if len(plan.measures) > 1:
        lines.append(f"No trial beats these in {' and '.join(plan.measures)} at once: {_numbers(outcome.front)}.")
    return lines


def _trials(numbers: Sequence[int]) -> str:
    return f"{'Trials' if len(numbers) > 1 else 'Trial'} {_numbers(numbers)}"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The content of the sweep's `results.json`."""
    best = outcome.best
    return {
        "schema": SCHEMA,
        "measures": dict(outcome.plan.measures),
        "seeds": list(outcome.plan.seeds),
        "trials": [
            {
                "trial": trial.number,
                "setting": dict(trial.setting),
                "state": trial.state,
                **({"message": trial.message} if trial.message else {}),
                "measures": {name: trial.mean(name) for name in (trial.runs[0].measures if trial.runs else ())},
                "runs": [
                    {name: value for name, value in vars(run).items() if name not in ("rows", "message")}
                    for run in trial.runs
                ],
            }
            for trial in outcome.trials
        ],
        "best": None if best is None else best.number,
        "differences": [{**vars(one), "told_apart": one.told_apart} for one in outcome.differences],
        "level": LEVEL,
        "front": list(outcome.front),
        "verdict": verdict(outcome),
    }


def as_csv(outcome: Outcome) -> str:
    """A row per run: trial, seed, state, settings, measures, times, folder."""
    axes = list(outcome.plan.axes)
    runs = [(trial, run) for trial in outcome.trials for run in trial.runs]
    measures = list(next((run.measures for _, run in runs if run.measures), {}))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "seed", "state", *axes, *measures, "seconds", "cpu_seconds", "folder", "message"])
    for trial, run in runs:
        values = [trial.setting.get(name, "") for name in axes] + [run.measures.get(name, "") for name in measures]
        times = [run.seconds, run.cpu_seconds]
        writer.writerow([trial.number, run.seed, run.state, *values, *times, run.folder, run.message])
    return text.getvalue()
