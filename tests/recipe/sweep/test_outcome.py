"""Measures by hand, and which trials can be told apart."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
import torch

from prefopt.recipe.sweep.measures import MEASURES, PairLogps, measured, row_values
from prefopt.recipe.sweep.outcome import Tried, as_csv, as_json, outcome_of, verdict
from prefopt.recipe.sweep.plan import SweepPlan
from prefopt.recipe.sweep.trial import RunResult
from prefopt.safety.errors import UsageError


def logps(chosen, rejected, lengths=((2, 4, 5), (1, 4, 2))) -> PairLogps:
    return PairLogps(*(torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected, *lengths)))


def test_measures_by_hand():
    start = logps((-4.0, -8.0, -5.0), (-2.0, -8.0, -4.0))
    after = logps((-3.0, -9.0, -5.0), (-5.0, -6.0, -4.0))
    rows = row_values(after, start)
    assert rows == {
        "accuracy": [1, 0, 0.5],  # the third pair has not moved
        "margin": [1 + 3, -1 - 2, 0],
        "chosen": [1, -1, 0],
        "rejected": [-3, 2, 0],
        "token_accuracy": [1, 0, 1],  # -1.5 and -5; -2.25 and -1.5; -1 and -2
        "chosen_nll": [1.5, 2.25, 1],
    }
    assert [*rows, "kl"] == list(MEASURES)  # KL is of answers, not of these rows
    assert measured(rows)["accuracy"] == 0.5


def test_other_rows_than_the_start_are_refused():
    start = logps((-4.0, -8.0, -5.0), (-2.0, -8.0, -4.0))
    with pytest.raises(UsageError, match="other held-out rows"):
        row_values(logps((-4.0, -8.0, -5.0), (-2.0, -8.0, -4.0), ((2, 4, 6), (1, 4, 2))), start)


def plan(measures, seeds=(0,)) -> SweepPlan:
    return SweepPlan({}, {"loss": ("a", "b", "c")}, Path("out"), Path("s.yaml"), "grid", 3, measures, False, seeds, 0)


def tried(number, *seeds, **more) -> Tried:
    """Seeds as lists of each pair's margin; `more` are other measures, a number each."""
    runs = []
    for seed, margins in enumerate(seeds):
        measures = {"margin": math.fsum(margins) / len(margins), **more}
        runs.append(RunResult("finished", seed, f"t{number}/s{seed}", measures, {"margin": list(margins)}))
    return Tried(number, {"loss": "abc"[number]}, "finished", "", tuple(runs))


SMALL = [0.1 * (n % 5) for n in range(40)]


def test_a_clear_winner_is_told_apart():
    outcome = outcome_of(plan({"margin": "maximize"}), [tried(0, SMALL), tried(1, [m + 1 for m in SMALL])])
    assert outcome.best.number == 1
    (difference,) = outcome.differences
    assert (difference.trial, difference.value, difference.low) == pytest.approx((0, 1, 1))
    assert outcome.close == []
    assert "It can be told apart from every other trial." in verdict(outcome)


def test_equal_trials_are_called_equal():
    two = outcome_of(plan({"margin": "maximize"}), [tried(0, [1.0, 0.0]), tried(1, [1.0, 0.0]), tried(2, [0.0, 0.0])])
    text = " ".join(verdict(two))
    assert "Trial 1 has the same margin." in text
    assert "Ahead of trial 2 by 0.5" in text
    assert "Ahead of trial 1" not in text


def test_noise_is_not_told_apart():
    noise = [m + 0.3 * (-1) ** n + 0.01 for n, m in enumerate(SMALL)]
    outcome = outcome_of(plan({"margin": "maximize"}), [tried(0, SMALL), tried(1, noise)])
    assert outcome.best.number == 1
    assert outcome.close == [0]
    assert any("cannot be told apart from any other" in line for line in verdict(outcome))


def test_seeds_that_disagree_widen_the_interval():
    """Rows differ by exactly 1, 0.1 and 1.9 in three seeds: over rows there is no doubt, over seeds there is."""
    better = [[m + by for m in SMALL] for by in (1, 0.1, 1.9)]
    outcome = outcome_of(plan({"margin": "maximize"}, (0, 1, 2)), [tried(0, *[SMALL] * 3), tried(1, *better)])
    (difference,) = outcome.differences
    assert difference.value == pytest.approx(1)
    # t(0.975, 2) = 4.303, standard deviation 0.9
    assert difference.low == pytest.approx(1 - 4.303 * 0.9 / 3**0.5, abs=1e-3)
    assert outcome.close == [0]


def test_less_is_better_where_it_is_minimized():
    outcome = outcome_of(plan({"margin": "minimize"}), [tried(0, SMALL), tried(1, [m + 1 for m in SMALL])])
    assert outcome.best.number == 0
    assert outcome.differences[0].value == pytest.approx(1)


def test_several_measures_have_a_front():
    trials = [
        tried(0, [1.0, 1.0], chosen_nll=3.0),
        tried(1, [2.0, 2.0], chosen_nll=4.0),
        tried(2, [1.0, 1.0], chosen_nll=4.0),
    ]
    outcome = outcome_of(plan({"margin": "maximize", "chosen_nll": "minimize"}), trials)
    assert outcome.best.number == 1
    assert outcome.front == [0, 1]


def test_failed_trials_are_in_the_files_and_are_never_the_best():
    lost = RunResult("failed", 0, "t1", message="too hot")
    trials = [tried(0, [1.0, 1.0]), Tried(1, {"loss": "b"}, "failed", "too hot", (lost,))]
    outcome = outcome_of(plan({"margin": "maximize"}), trials)
    assert outcome.best.number == 0
    rows = list(csv.DictReader(io.StringIO(as_csv(outcome))))
    assert [(row["state"], row["loss"], row["margin"]) for row in rows] == [
        ("finished", "a", "1.0"),
        ("failed", "b", ""),
    ]
    assert as_json(outcome)["trials"][1]["message"] == "too hot"
    none = outcome_of(plan({"margin": "maximize"}), trials[1:])
    assert none.best is None
    assert verdict(none) == ["No trial finished, so there is no best one."]
