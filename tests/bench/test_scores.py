"""scripts/bench/scores.py knows the truth of its world; `speed.py --groups` gives all arms the same answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))  # scripts import neighbours by name

import _groups
import scores
import speed


def world(prompts=6):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(scores.FEATURES, generator=generator, dtype=torch.float64)
    return scores.World.make(prompts, truth / truth.norm(), generator), truth / truth.norm()


def test_the_true_weights_are_the_optimum_and_no_weights_the_reference():
    made, truth = world()
    assert scores.measured(truth, made) == pytest.approx((1.0, 0.0))
    assert scores.measured(0 * truth, made)[0] == 0
    assert (made.scores.diff(dim=1) <= 0).all()


def test_pairs_are_the_best_and_the_worst_or_all():
    made, truth = world()
    logps = made.logps(truth)
    few, all_pairs = (scores.pairs(made, logps, every) for every in (False, True))
    assert len(few.chosen) == 6
    assert len(all_pairs.chosen) == 6 * 28
    assert (few.chosen.columns["chosen_score"] == made.scores[:, 0]).all()
    assert (all_pairs.chosen.columns["chosen_score"] >= all_pairs.chosen.columns["rejected_score"]).all()


@pytest.mark.parametrize("name", ["pairs, best and worst", "8 scores", "order of 8, win rates"])
def test_training_brings_the_order_of_unseen_answers_closer(name):
    made, _ = world(24)
    learned = scores.train(name, made, steps=15)
    unseen, _ = world(30)
    assert scores.measured(learned, unseen)[0] > 0.6


def test_all_arms_hold_the_same_answers_and_pairs_apart_have_prompts_of_their_own():
    rows = [{"prompt": f"p{n}", "completions": [f"a{n}", f"b{n}", f"c{n}"], "scores": [0, -1, -2]} for n in range(2)]
    apart, together = (_groups.rows_of(arm, rows) for arm in ("pairs apart", "pairs together"))
    assert [row["prompt"] for row in apart] == ["p0", "p1", "p0", "p1"]
    assert [row["prompt"] for row in together] == ["p0", "p0", "p1", "p1"]
    key = lambda row: sorted(row.items())  # noqa: E731
    assert sorted(apart, key=key) == sorted(together, key=key)
    assert {row["chosen"] for row in apart} == {"a0", "a1"}
    assert _groups.rows_of("group", rows) == rows


def test_options_of_groups_without_effect_are_refused(capsys):
    with pytest.raises(SystemExit):
        speed.parse(["--groups"])
    assert "give --completions" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.parse(["--groups", "--completions", "8", "--data", "x.jsonl"])
