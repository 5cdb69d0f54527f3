"""What single objectives promise beyond the common contract: identities, limits, the meaning of an average."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from prefopt.losses import DPO, IPO, KTO, SFT, Hinge, Loss, PairLoss, PreferenceBatch, Scores, SimPO, parse, register
from prefopt.losses.registry import _LOSSES
from tests.losses.cases import Row, make_batch, random_rows


def test_ipo_averaged_and_summed_are_one_loss_at_equal_lengths():
    n = 7
    rows = [replace(row, nw=n, nl=n) for row in random_rows(5)]
    averaged = IPO(beta=0.3)(make_batch(rows)).per_example * n**2
    torch.testing.assert_close(averaged, IPO(beta=0.3 / n, average=False)(make_batch(rows)).per_example)


def test_ipo_pushes_back_past_its_target():
    tau = 0.25
    before, past = (
        make_batch([Row(pw=-10 + gap, pl=-10, rw=-10, rl=-10, nw=1, nl=1)], requires_grad=True) for gap in (1.9, 2.1)
    )
    for batch, sign in ((before, -1), (past, 1)):
        IPO(beta=tau)(batch).loss.backward()
        assert torch.sign(batch.chosen.logps.grad) == sign


def test_ipo_reward_margin_reaches_one_half_at_the_target():
    output = IPO(beta=0.25)(make_batch([Row(pw=-8, pl=-10, rw=-10, rl=-10, nw=1, nl=1)]))
    assert output.mean_metrics()["rewards/margins"] == pytest.approx(0.5)
    assert float(output.loss) == 0


def test_dpo_label_smoothing_is_the_mixture_over_flips():
    batch = make_batch(random_rows(4))
    flipped = PreferenceBatch(chosen=batch.rejected, rejected=batch.chosen)
    mixed = 0.8 * DPO(0.1)(batch).loss + 0.2 * DPO(0.1)(flipped).loss
    torch.testing.assert_close(DPO(0.1, label_smoothing=0.2)(batch).loss, mixed)


def test_dpo_label_smoothing_has_its_minimum_where_the_docstring_says():
    beta, e = 0.1, 0.2
    best = math.log((1 - e) / e) / beta
    batch = make_batch([Row(pw=best, pl=0, rw=0, rl=0, nw=1, nl=1)], requires_grad=True)
    DPO(beta, e)(batch).loss.backward()
    assert abs(float(batch.chosen.logps.grad)) < 1e-12


def test_dpo_is_unmoved_by_what_both_completions_share():
    rows = random_rows(3)
    shifted = [replace(row, pw=row.pw + 3, pl=row.pl + 3) for row in rows]
    torch.testing.assert_close(DPO()(make_batch(rows)).loss, DPO()(make_batch(shifted)).loss)


def test_hinge_is_flat_past_its_margin():
    batch = make_batch([Row(pw=0, pl=-11, rw=0, rl=0, nw=1, nl=1)], requires_grad=True)
    output = Hinge(beta=0.1)(batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert float(batch.chosen.logps.grad) == 0


def test_simpo_without_margin_is_a_reference_free_dpo_at_equal_lengths():
    n = 6
    rows = [replace(row, nw=n, nl=n, rw=0.0, rl=0.0) for row in random_rows(4)]
    torch.testing.assert_close(SimPO(2.0, gamma=0.0)(make_batch(rows)).loss, DPO(2.0 / n)(make_batch(rows)).loss)


def test_sft_normalisations_differ_with_lengths():
    rows = [Row(-6, -1, 0, 0, 2, 1), Row(-4, -1, 0, 0, 8, 1)]
    batch = make_batch(rows)
    assert float(SFT("mean")(batch).loss) == pytest.approx((3 + 0.5) / 2)
    assert float(SFT("sum")(batch).loss) == pytest.approx(5)
    assert float(SFT("token")(batch).loss) == pytest.approx(1)


def unpaired(chosen: list[float], rejected: list[float], shifts: list[float]) -> PreferenceBatch:
    def scores(ratios: list[float]) -> Scores:
        logps = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
        return Scores(logps, torch.ones(len(ratios), dtype=torch.long), torch.zeros(len(ratios), dtype=torch.float64))

    return PreferenceBatch(scores(chosen), scores(rejected), scores(shifts), paired=False)


def test_kto_takes_unequal_roles_and_means_over_all_completions():
    output = KTO(beta=1.0)(unpaired([0.0, 0.0, 0.0], [0.0], [0.0] * 4))
    assert output.per_example.tolist() == [0.5] * 4
    assert float(output.loss) == 0.5


@pytest.mark.parametrize(("chosen", "rejected"), [([1.0, 2.0], []), ([], [1.0, 2.0])])
def test_kto_takes_a_batch_with_one_role_only(chosen, rejected):
    output = KTO()(unpaired(chosen, rejected, [0.0, 0.0]))
    assert output.per_example.shape == (2,)
    assert torch.isfinite(output.loss)


def test_kto_baseline_is_never_negative_and_carries_no_gradient():
    batch = unpaired([0.0], [0.0], [-5.0, -6.0])
    output = KTO(beta=1.0)(batch)
    output.loss.backward()
    assert output.per_example.tolist() == [0.5, 0.5]
    assert batch.mismatched.logps.grad is None


def test_sums_add_values_needs_and_metrics():
    batch = make_batch(random_rows(4))
    total = DPO(0.1) + 0.2 * SFT()
    expected = DPO(0.1)(batch).loss + 0.2 * SFT()(batch).loss
    output = total(batch)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.per_example.mean(), expected)
    assert total.needs == DPO().needs
    assert {"dpo/loss", "sft/loss", "rewards/margins", "dpo/rewards/accuracies"} <= set(output.metrics)


def test_a_sum_of_losses_of_different_roles_has_no_common_values():
    output = (KTO() + SFT())(make_batch(random_rows(3)))
    assert output.per_example is None
    assert torch.isfinite(output.loss)


def test_arithmetic_flattens_and_distributes():
    loss = 2 * (DPO() - 0.5 * SFT()) + DPO(0.3)
    assert [(weight, label) for weight, label, _ in loss.terms()] == [(2.0, "dpo"), (-1.0, "sft"), (1.0, "dpo_2")]
    assert str(parse(str(loss))) == str(loss)


def test_a_pair_loss_refuses_unpaired_feedback():
    with pytest.raises(ValueError, match="unpaired feedback"):
        DPO()(unpaired([1.0], [1.0], [0.0]))


def test_a_paired_batch_needs_equal_roles():
    with pytest.raises(ValueError, match="2 and 1"):
        PreferenceBatch(Scores(torch.zeros(2), torch.ones(2)), Scores(torch.zeros(1), torch.ones(1)))


def test_scores_refuse_columns_of_another_length():
    with pytest.raises(ValueError, match="weight must have 2 rows"):
        Scores(torch.zeros(2), torch.ones(2), columns={"weight": torch.ones(3)})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_hyperparameters_are_checked_where_they_are_written(value):
    with pytest.raises(ValueError, match="beta must be a positive finite number"):
        DPO(beta=value)


def test_a_projects_own_loss_joins_the_registry():
    @register("always_two")
    class AlwaysTwo(PairLoss):
        def per_example(self, batch):
            return batch.chosen.logps * 0 + 2

    try:
        assert float(parse("0.5*always_two")(make_batch(random_rows(3))).loss) == 1
        with pytest.raises(ValueError, match="already belongs to"):
            register("always_two")(type("Other", (Loss,), {}))
    finally:
        del _LOSSES["always_two"]


def test_kto_takes_the_last_baseline_for_a_batch_that_has_none():
    loss = KTO(beta=1.0)
    loss(unpaired([0.0], [0.0], [2.0, 2.0]))
    alone = loss(unpaired([2.0], [], []))
    assert alone.per_example.tolist() == [0.5]
