"""Terms about the rows to forget or to retain alone: values worked by hand, and what they leave untouched."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefopt.losses import PreferenceBatch, Scores, parse

FORGET = torch.tensor([1.0, 0.0, 1.0, 0.0])
CHOSEN = [-4.0, -6.0, -8.0, -10.0]
REJECTED = [-2.0, -9.0, -3.0, -9.0]


def batch(forget: torch.Tensor = FORGET) -> PreferenceBatch:
    """Four pairs, two of them to forget; the reference's sums are one nat lower for chosen and equal for rejected."""

    def scores(sums: list[float], references: list[float], lengths: list[int]) -> Scores:
        logps = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
        return Scores(
            logps, torch.tensor(lengths), ref_logps=torch.tensor(references, dtype=torch.float64),
            columns={"forget": forget},
        )  # fmt: skip

    return PreferenceBatch(scores(CHOSEN, [x - 1 for x in CHOSEN], [2, 3, 2, 5]), scores(REJECTED, REJECTED, [3] * 4))


def test_dpo_rt_is_the_sum_that_open_unlearning_trains_with():
    output = parse("dpo_idk_rt(beta=0.1, retain=2.0)")(batch())
    forget = -2 / 0.1 * math.log(1 / (1 + math.exp(-0.1 * 1.0)))  # the same margin, 1, in both pairs
    retain = (6 + 10) / (3 + 5)  # per token of the retain answers
    assert float(output.loss) == pytest.approx(forget + 2.0 * retain)


def test_a_term_has_no_gradient_on_the_other_part():
    for loss, rows in (("on_forget(dpo)", [0, 2]), ("on_retain(sft(nll='mean'))", [1, 3])):
        pairs = batch()
        parse(loss)(pairs).loss.backward()
        assert pairs.chosen.logps.grad.nonzero().flatten().tolist() == rows


def test_kto_s_baseline_is_that_of_the_forget_set():
    pairs = batch()
    moved = replace(pairs, chosen=replace(pairs.chosen, ref_logps=torch.tensor([-5.0, 90, -9, 90]).double()))
    assert float(parse("on_forget(kto_forget)")(moved).loss) == float(parse("on_forget(kto_forget)")(pairs).loss)


def test_rewards_are_logged_for_the_part_alone():
    metrics = parse("dpo_idk_rt")(batch()).metrics
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.1, 0.1])
    assert float(metrics["on_forget/loss"].mean()) == pytest.approx(math.log1p(math.exp(-0.1)))


def test_without_an_example_of_the_part_the_loss_is_zero():
    output = parse("on_forget(dpo)")(batch(torch.zeros(4)))
    assert float(output.loss) == 0
    assert output.loss.requires_grad
    assert output.mean_metrics() == {}


def test_without_the_column_it_is_refused():
    pairs = batch()
    bare = replace(pairs, chosen=replace(pairs.chosen, columns={}), rejected=replace(pairs.rejected, columns={}))
    with pytest.raises(ValueError, match="needs a numeric data set column 'forget'; the batch has none"):
        parse("dpo_idk_rt")(bare)
