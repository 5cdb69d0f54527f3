"""What single objectives promise beyond the common contract: identities, limits, the meaning of an average."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefopt.losses import (
    DPO,
    IPO,
    KTO,
    SFT,
    Hinge,
    Loss,
    Need,
    PairLoss,
    PreferenceBatch,
    Scores,
    SimPO,
    available,
    parse,
    register,
)
from prefopt.losses.base import arguments_of
from prefopt.losses.errors import LossError
from prefopt.losses.registry import _LOSSES
from prefopt.losses.scores import Role
from prefopt.scoring import Extras, RowGroups, assemble_batch, token_scores
from tests.losses.cases import REFERENCE_VECTOR, Row, make_batch, random_rows


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


@pytest.mark.parametrize("name", ["logps", "lengths"])
@pytest.mark.parametrize("value", [[-1.0, -2.0], None, np.array([-1.0, -2.0])], ids=["list", "none", "array"])
def test_scores_that_are_no_tensors_are_named(name, value):
    given = {"logps": torch.zeros(2), "lengths": torch.ones(2), name: value}
    with pytest.raises(LossError, match=f"Scores.{name} must be a tensor of shape .N,., got {type(value).__name__}"):
        Scores(**given)


@pytest.mark.parametrize("value", [None, "0.1", [0.1], {"beta": 0.1}], ids=str)
def test_hyperparameters_that_are_no_numbers_are_named(value):
    with pytest.raises(LossError, match=r"^beta must be a number, got"):
        DPO(beta=value)
    with pytest.raises(LossError, match=r"^label_smoothing must be a number, got"):
        DPO(label_smoothing=value)


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


def test_a_resumed_run_takes_the_baseline_that_the_stopped_one_would_have():
    loss, resumed = KTO(beta=1.0), KTO(beta=1.0)
    loss(unpaired([0.0], [0.0], [2.0, 2.0]))
    resumed.load_state_dict(loss.state_dict())
    assert resumed(unpaired([2.0], [], [])).per_example.tolist() == [0.5]


def test_an_evaluation_does_not_move_the_baseline_that_training_takes():
    loss = KTO(beta=1.0)
    loss(unpaired([0.0], [0.0], [2.0, 2.0]))
    loss.eval()
    loss(unpaired([0.0], [0.0], [5.0, 5.0]))
    loss.train()
    assert loss(unpaired([2.0], [], [])).per_example.tolist() == [0.5]


def test_a_loss_without_a_name_is_called_by_its_class():
    class Unnamed(PairLoss):
        needs = Need.REFERENCE

        def per_example(self, batch):
            return batch.chosen.ratios

    batch = make_batch(random_rows(2))
    with pytest.raises(ValueError, match=r"^Unnamed needs chosen and rejected completions"):
        Unnamed()(PreferenceBatch(chosen=batch.chosen))
    with pytest.raises(ValueError, match=r"^Unnamed needs ref_logps"):
        Unnamed()(replace(batch, chosen=replace(batch.chosen, ref_logps=None)))


# ---- exact relations between objectives ----------------------------------------------------------------------------


def assert_same(first: str, second: str, rows: list[Row], factor: float = 1.0, **tolerance: float) -> None:
    """Whether two expressions give the same values and the same gradients, up to a factor."""
    results = []
    for text in (first, second):
        batch = make_batch(rows, requires_grad=True)
        output = parse(text)(batch)
        output.loss.backward()
        leaves = (batch.chosen.logps, batch.rejected.logps)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append((output.per_example, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, factor * theirs, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize(
    "expression",
    [
        "robust(beta=0.3)",
        "gpo(beta=0.3)",
        "hdpo(beta=0.3, alpha=1.0)",
        "dpop(beta=0.3, lam=0.0)",
        "rdpo(beta=0.3, alpha=0.0)",
        "tdpo(beta=0.3, alpha=0.0)",
        "beta_dpo(beta=0.3, a=0.0, keep=1.0)",
        "f_dpo(beta=0.3)",
        "f_dpo(beta=0.3, divergence='alpha', alpha=1.0)",
        "noise_robust(dpo(beta=0.3), method='unbiased', rate=0.0)",
        "rpo(beta=0.3, eta=0.0)",
        "irpo(beta=0.3, alpha=0.0)",
    ],
)
def test_is_dpo_at_its_limit(expression):
    assert_same(expression, "dpo(beta=0.3)", random_rows(6))


def test_ld_dpo_with_all_tokens_is_dpo():
    batch = make_batch(random_rows(6))
    torch.testing.assert_close(parse("ld_dpo(alpha=1.0)")(batch).per_example, parse("dpo")(batch).per_example)


def test_alpha_divergence_tends_to_the_reverse_and_the_forward_kl():
    rows = random_rows(5)
    assert_same("f_dpo(divergence='alpha', alpha=0.999999)", "dpo", rows, rtol=1e-4, atol=1e-6)
    assert_same("f_dpo(divergence='alpha', alpha=0.0)", "f_dpo(divergence='forward_kl')", rows)


@pytest.mark.parametrize("expression", ["aot", "aot_unpaired"])
def test_optimal_transport_of_one_pair_is_dpo(expression):
    rows = random_rows(1)
    values = parse(expression)(make_batch(rows)).loss
    torch.testing.assert_close(values, parse("dpo")(make_batch(rows)).loss)


def test_hdpo_is_dpo_with_a_rescaled_reference():
    rows = random_rows(5)
    rescaled = [replace(row, rw=row.rw / 0.8, rl=row.rl / 0.8) for row in rows]
    torch.testing.assert_close(
        parse("hdpo(beta=0.5, alpha=0.8)")(make_batch(rows)).per_example,
        parse("dpo(beta=0.4)")(make_batch(rescaled)).per_example,
    )


def test_robust_dpo_is_unbiased_over_flips():
    batch = make_batch(random_rows(5))
    flipped = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    robust = parse("robust(label_smoothing=0.2)")
    mean = 0.8 * robust(batch).loss + 0.2 * robust(flipped).loss
    torch.testing.assert_close(mean, parse("dpo")(batch).loss)
    assert_same("noise_robust(dpo, method='unbiased', rate=0.2)", "robust(label_smoothing=0.2)", random_rows(5))
    assert_same("noise_robust(dpo, method='smoothed', rate=0.2)", "dpo(label_smoothing=0.2)", random_rows(5))


def test_normalised_losses_of_both_orders_sum_to_one():
    batch = make_batch(random_rows(5))
    flipped = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    loss = parse("noise_robust(ipo)")
    torch.testing.assert_close(loss(batch).per_example + loss(flipped).per_example, torch.ones(5, dtype=torch.float64))


def test_length_normalisation_gives_the_named_forms():
    rows = random_rows(5)
    assert_same("length_normalized(dpo(beta=2.0))", "dpo_norm(beta=2.0)", rows)
    assert_same("length_normalized(cpo(beta=2.0))", "simpo(beta=2.0, gamma=0.0)", rows)
    assert_same("length_normalized(ipo(average=False))", "ipo", rows)
    with pytest.raises(ValueError, match="loss must work on summed"):
        parse("length_normalized(tdpo)")


def test_alpha_po_and_alpha_dpo_tend_to_simpo():
    rows = random_rows(5)
    assert_same("alpha_po(beta=2.0, gamma=1.0, alpha=0.0)", "simpo(beta=2.0, gamma=1.0)", rows)
    assert_same("alpha_po(beta=2.0, gamma=1.0, alpha=1e-7)", "simpo(beta=2.0, gamma=1.0)", rows, rtol=1e-4, atol=1e-6)
    assert_same("alpha_dpo(beta=2.0, gamma=1.0, alpha=0.0)", "simpo(beta=2.0, gamma=1.0)", rows)


@pytest.mark.parametrize("near", [1e-3, 1e-5, 1e-7])
def test_limits_are_approached_without_losing_digits(near):
    for expression in (f"f_dpo(divergence='alpha', alpha={1 - near!r})", f"alpha_po(alpha={near!r})"):
        exact = parse(expression)(make_batch(random_rows(5))).per_example
        single = parse(expression)(make_batch(random_rows(5), torch.float32)).per_example
        torch.testing.assert_close(single.double(), exact, rtol=3e-6, atol=3e-6)


def test_inpo_is_ipo_in_its_first_iteration_and_at_tau_equal_to_eta():
    rows = random_rows(5)
    assert_same("inpo(eta=0.5, tau=0.5)", "ipo(beta=0.5, average=False)", rows)
    first = [replace(row, qw=row.rw, ql=row.rl) for row in rows]
    assert_same("inpo(eta=0.5, tau=0.1)", "ipo(beta=0.5, average=False)", first)


def test_npo_is_dpo_without_its_chosen_completion():
    rows = [replace(row, pw=row.rw) for row in random_rows(5)]
    batch = make_batch(rows)
    torch.testing.assert_close(
        parse("npo(beta=0.2)")(batch).per_example, 10 * parse("dpo(beta=0.2)")(batch).per_example
    )


def test_npo_tends_to_gradient_ascent_and_starts_as_it():
    rows = random_rows(5)
    batch = make_batch(rows)
    beta = 1e-4
    values = parse(f"npo(beta={beta})")(batch).per_example - 2 / beta * math.log(2)
    torch.testing.assert_close(values, batch.rejected.ratios, rtol=1e-3, atol=1e-3)
    for expression in ("npo(beta=0.7)", "ga(nll='sum')"):
        start = make_batch([replace(row, rl=row.pl) for row in rows], requires_grad=True)
        parse(expression)(start).loss.backward()
        torch.testing.assert_close(start.rejected.logps.grad, torch.full((5,), 0.2, dtype=torch.float64))


def logits_of_tiny_model(seed: int) -> torch.Tensor:
    """(2, 6, 20) float64 logits that a two-layer network gives for fixed inputs."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)


def test_npo_with_a_vanishing_beta_has_the_gradient_of_gradient_ascent_on_logits():
    """Proposition 1 of 2404.05868, with a policy that has moved away from its reference."""
    labels = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    reference = torch.log_softmax(logits_of_tiny_model(1), -1).gather(-1, labels[..., None]).sum((1, 2))

    def gradient(expression: str) -> torch.Tensor:
        logits = logits_of_tiny_model(0).requires_grad_()
        sums = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).sum((1, 2))
        batch = PreferenceBatch(rejected=Scores(sums, torch.full((2,), 6), reference))
        return torch.autograd.grad(parse(expression)(batch).loss, logits)[0]

    ascent = gradient("ga(nll='sum')")
    gaps = [float((gradient(f"npo(beta={beta})") - ascent).norm() / ascent.norm()) for beta in (1e-2, 1e-4, 1e-6)]
    # The weight of an example is 2 sigmoid(beta u) = 1 + beta u / 2 + ...: the gap shrinks with beta.
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.02)
    assert gaps[2] == pytest.approx(gaps[1] / 100, rel=1e-5)
    assert gaps[2] < 1e-5


def test_ce_u_is_the_papers_cross_entropy_without_its_constant():
    """Its gradient is that of the cross-entropy to the policy's own distribution without the token."""
    labels = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    logits = logits_of_tiny_model(0).requires_grad_()
    without = logits.detach().scatter(-1, labels[..., None], -torch.inf)
    target = torch.softmax(without, -1)
    theirs = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), target[:, 1:].flatten(0, 1))
    scores = token_scores(logits, labels, torch.ones_like(labels), Extras(Need.OTHERS))
    batch = assemble_batch(
        RowGroups(torch.full((2,), int(Role.REJECTED)), torch.arange(2), {}, False), scores, parse("ce_u")
    )
    ours = parse("ce_u")(batch).loss
    constant = torch.distributions.Categorical(probs=target[:, 1:]).entropy().mean()
    torch.testing.assert_close(ours, theirs - constant)
    mine, other = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, other)


def test_dual_ascent_follows_its_recursion():
    loss = parse("dual(sft(nll='mean'), limit=2.0, weight=3.0, step=0.5, warmup=1)")
    weight = 3.0
    for number, logp in enumerate((-3.0, -3.0, -1.0, -0.5, -0.0, -0.0, -0.0, -9.0)):
        batch = make_batch([Row(pw=4 * logp, pl=-5, rw=-5, rl=-5, nw=4, nl=4)] * 2)
        output = loss(batch)
        assert float(output.loss) == pytest.approx(weight * (-logp - 2.0))
        if number >= 1:
            weight = max(0.0, weight + 0.5 * (-logp - 2.0))
        assert output.mean_metrics()["dual/weight"] == pytest.approx(weight)
        assert output.mean_metrics()["dual/excess"] == pytest.approx(-logp - 2.0)
    assert weight == pytest.approx(3.5)  # from 0, where four good batches had brought it


def test_dual_ascent_stands_still_without_examples_and_in_evaluation():
    loss = parse("dual(sft(nll='mean'), limit=2.0, weight=3.0)")
    batch = make_batch([Row(-8, -5, -5, -5, 4, 4)], weight=[0.0])
    loss(batch)
    loss.eval()
    loss(make_batch([Row(-80, -5, -5, -5, 4, 4)]))
    assert float(loss.multiplier) == 3.0
    assert int(loss.batches) == 0


def test_gpo_squared_is_summed_ipo():
    assert_same("gpo(beta=0.5, shape='squared')", "ipo(beta=0.25, average=False)", random_rows(5), factor=4 * 0.25**2)


def test_gpo_normalised_shapes_start_with_the_same_step():
    from prefopt.losses.shapes import SHAPES

    for shape in SHAPES:
        batch = make_batch([Row(-5, -5, -5, -5, 3, 3)], requires_grad=True)
        parse(f"gpo(beta=0.4, shape={shape!r}, normalize=True)")(batch).loss.backward()
        assert float(batch.chosen.logps.grad) == pytest.approx(-0.4), shape


def test_the_surrogate_ensemble_draws_convex_mixtures_and_means_them_in_evaluation():
    loss = parse("surrogate_ensemble(seed=3)")
    draws = [loss.weights() for _ in range(2)]
    assert draws[0] != draws[1]
    assert all(sum(weights) == pytest.approx(1) and min(weights) > 0 for weights in draws)
    loss.eval()
    assert len(set(loss.weights())) == 1


def test_where_minima_are():
    def slope(expression: str, uw: float, ul: float, leaf: str) -> float:
        batch = make_batch([Row(pw=-20 + uw, pl=-20 + ul, rw=-20, rl=-20, nw=4, nl=4)], requires_grad=True)
        parse(expression)(batch).loss.backward()
        return float(getattr(batch, leaf).logps.grad)

    assert slope("nca(beta=0.5)", math.log(2) / 0.5, 1.0, "chosen") == pytest.approx(0, abs=1e-12)
    assert slope("exo(beta=0.5, label_smoothing=0.1)", math.log(9) / 0.5, 0.0, "chosen") == pytest.approx(0, abs=1e-12)
    for x in (-0.1185, 0.0721):
        assert slope("discopop(beta=1.0)", x, 0.0, "chosen") == pytest.approx(0, abs=2e-3)
    assert slope("discopop(beta=1.0)", 0.0, 0.0, "chosen") > 0 > slope("dpo(beta=1.0)", 0.0, 0.0, "chosen")


@pytest.mark.parametrize(
    ("x", "value"),
    [(-0.5, 0.97411), (-0.1, 0.78740), (0, 0.84657), (0.1, 0.87379), (0.5, 0.60652), (1, 0.36788), (2, 0.13534)],
)
def test_discopop_at_published_points(x, value):
    assert float(parse("discopop(beta=1.0)")(make_batch([Row(-20 + x, -20, -20, -20, 4, 4)])).loss) == pytest.approx(
        value, abs=6e-6
    )


def test_bounds_between_objectives():
    batch = make_batch(random_rows(50))

    def values(text: str) -> torch.Tensor:
        return parse(text)(batch).per_example

    assert (values("bco_pair") >= values("dpo")).all()
    assert (values("cell(beta=0.1)") > values("dpo")).all()
    assert (values("orpo") <= values("asft")).all()
    up, down = batch.chosen.mean_logps, batch.rejected.mean_logps
    torch.testing.assert_close(values("asft"), -up - torch.log1p(-torch.exp(down)))
    torch.testing.assert_close(
        values("orpo") - values("asft"), torch.log(torch.exp(up) + torch.exp(down) - 2 * torch.exp(up + down))
    )


def test_pairwise_cringe_tends_to_binary_cringe_and_to_a_hard_gate():
    rows = random_rows(4)
    open_gate = parse("pairwise_cringe(margin=1e9, k=1)")(make_batch(rows)).per_example
    up, down = parse("cringe")(make_batch(rows)).per_example.split(4)
    torch.testing.assert_close(open_gate, up + down)
    hard = parse("pairwise_cringe(margin=0.0, temperature=1e-6, k=1)")(make_batch(rows)).per_example
    closed = torch.tensor([row.pw - row.pl > 0 for row in rows])
    torch.testing.assert_close(hard, torch.where(closed, torch.zeros_like(up), up + down))


def test_cringe_draws_follow_the_softmax_over_the_other_tokens():
    from prefopt.losses.cringe import token_contrast
    from prefopt.losses.numerics import numbered_generator

    # Token 7 is the completion's; the others have probabilities 0.6, 0.3 and 0.1 among the three candidates.
    kept = torch.log(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    top = torch.cat([kept[:1], torch.tensor([-0.9], dtype=torch.float64), kept[1:]])
    n = 20_000
    one = torch.ones(n, 1, dtype=torch.bool)
    scores = Scores(
        logps=torch.linspace(-2, -1, n, dtype=torch.float64),
        lengths=torch.ones(n, dtype=torch.long),
        token_logps=torch.full((n, 1), -0.9, dtype=torch.float64),
        token_mask=one,
        token_ids=torch.full((n, 1), 7),
        top_logps=top.expand(n, 1, 4),
        top_ids=torch.tensor([1, 7, 2, 3]).expand(n, 1, 4),
    )
    contrasts = token_contrast(scores, 3, numbered_generator(0, 0))
    for logp, share in zip(kept, (0.6, 0.3, 0.1), strict=True):
        drawn = torch.isclose(contrasts, torch.nn.functional.softplus(-0.9 - logp)).double().mean()
        assert float(drawn) == pytest.approx(share, abs=0.015)


def test_beta_dpo_follows_the_margins_and_drops_unusual_pairs():
    loss = parse("beta_dpo(beta=0.1, a=0.5, keep=0.75, momentum=0.5)")
    rows = [
        replace(row, pw=row.rw + gap, pl=row.rl) for row, gap in zip(random_rows(4), (1, 1.1, 0.9, 60), strict=True)
    ]
    dropped = (loss(make_batch(rows)).per_example == 0).tolist()
    assert sum(dropped) == 1
    torch.testing.assert_close(loss.margin_mean.double(), torch.tensor((1 + 1.1 + 0.9 + 60) / 4, dtype=torch.float64))
    loss.eval()
    usual = [replace(row, pw=row.rw + 2, pl=row.rl) for row in rows]
    beta = 0.1 * (1 + 0.5 * (2 - 15.75))
    expected = math.log1p(math.exp(-max(beta, 1e-3) * 2))
    assert float(loss(make_batch(usual)).loss) == pytest.approx(expected, rel=1e-5)


def test_bco_threshold_is_the_mean_of_all_rewards_so_far():
    loss = parse("bco(beta=1.0)")
    loss(make_batch([Row(-1, -1, -3, -1, 1, 1)]))  # rewards 2 and 0
    loss(make_batch([Row(-1, -1, -7, -1, 1, 1)]))  # rewards 6 and 0
    assert float(loss.reward_mean) == pytest.approx(2)
    assert float(loss.reward_count) == 4


def test_kl_online_has_the_gradient_of_the_exact_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    n = 200_000
    drawn = torch.multinomial(policy.detach().exp(), n, replacement=True, generator=generator)
    ones = torch.ones(n, dtype=torch.long)
    batch = PreferenceBatch(sampled=Scores(policy[drawn], ones, reference[drawn]))
    for baseline in ("none", "leave_one_out"):
        (gradient,) = torch.autograd.grad(
            parse(f"kl_online(baseline={baseline!r})")(batch).loss, logits, retain_graph=True
        )
        torch.testing.assert_close(gradient, exact, rtol=0, atol=3 / math.sqrt(n))


def test_unequal_classes_are_matched_by_quantile():
    def side(ratios: list[float]) -> Scores:
        values = torch.tensor(ratios, dtype=torch.float64)
        return Scores(values, torch.ones(len(ratios), dtype=torch.long), torch.zeros_like(values))

    batch = PreferenceBatch(side([3.0, 1.0]), side([0.0, 10.0, 20.0, 30.0]), paired=False)
    values = parse("aot_unpaired(beta=1.0)")(batch).per_example
    gaps = torch.tensor([3 - 30.0, 1 - 10.0, 1 - 0.0, 1 - 10.0, 3 - 20.0, 3 - 30.0], dtype=torch.float64)
    torch.testing.assert_close(values, torch.nn.functional.softplus(-gaps))


def test_wrappers_say_what_they_cannot_wrap():
    for text, message in {
        "noise_robust(npo)": "must be a pair loss",
        "noise_robust(beta_dpo)": "without state",
        "length_normalized(cringe)": "must work on summed",
        "length_normalized(rdpo(alpha=0.2))": r"alpha of rdpo\(beta=0.1, alpha=0.2\) does more with them",
        "length_normalized(dpo + 0.5*rdpo)": r"alpha of rdpo",
        "length_normalized(sft(nll='token'))": r"nll of sft\(nll='token'\) does more",
        "length_normalized(ga)": "nll of ga",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse(text)


@pytest.mark.parametrize("name", ["length_normalized", "noise_robust", "reweighted", "wpo"])
def test_no_wrapper_drops_an_argument_of_its_loss(name):
    """Doubled, moved or of another kind, an argument that changes a loss changes the wrapped loss, or is refused."""
    batch = make_batch(random_rows(6, seed=3))
    averaging = {"average", "nll"} if name == "length_normalized" else set()  # it averages what is not averaged yet
    method = ", method='smoothed'" if name == "noise_robust" else ""  # "normalized" drops any scale on purpose

    @functools.cache
    def value(expression: str) -> float | None:
        try:
            return float(parse(expression)(batch).loss)
        except (ValueError, AssertionError):
            return None

    for cls in available().values():
        for argument, parameter in arguments_of(cls).items():
            for other in others(parameter.default):
                plain, changed = (value(f"{cls.name}({text})") for text in ("", f"{argument}={other!r}"))
                if None in (plain, changed) or plain == changed or argument in averaging:
                    continue
                wrapped = [value(f"{name}({cls.name}({text}){method})") for text in ("", f"{argument}={other!r}")]
                assert None in wrapped or wrapped[0] != wrapped[1], (cls.name, argument, other)


def others(default: object) -> list[object]:
    """Other values that an argument with this default may take."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, (int, float)):
        return [default * 2 + 0.05, default + 1]
    words = ("mean", "sum", "token", "logistic", "hinge")
    return [word for word in words if word != default] if isinstance(default, str) else []


def test_needs_are_per_role():
    loss = parse("npo + kl_retain + 0.1*hinge")
    assert parse("npo + sft").needs_of("chosen") == Need.NONE
    assert parse("npo + sft").needs_of("rejected") == Need.REFERENCE
    assert loss.needs_of("chosen") == Need.FORWARD_KL | Need.REFERENCE
    assert parse("wpo(npo)").needs_of("rejected") == Need.REFERENCE | Need.COLLISION
    assert parse("wpo(npo)").needs_of("chosen") == Need.NONE


# ---- losses that read scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "scores", "equal"),
    [
        ("rebel(eta=5.0)", (1.0, 0.0), "ipo(beta=0.1, average=False)"),
        ("reward_aware(beta=0.1, scale=200.0)", (1.0, 0.0), "dpo(beta=0.1)"),
        ("reward_aware(beta=0.1, distance='sq')", (0.8, 0.3), "0.01*rebel(eta=10.0)"),
        ("reward_aware(beta=0.1, distance='scale')", (0.5, 3.5), "3.0*dpo(beta=0.1)"),
        ("mappo(beta=0.1)", (1.0, 0.0), "dpo(beta=0.1)"),
        ("mappo(beta=0.1)", (0.9, 0.15), "dpo_shift(beta=0.1, shift=0.75)"),
        ("sppo_soft(beta=0.1)", (1.0, 0.0), "sppo(beta=0.1)"),
        ("sppo_soft(beta=0.1, reduction='mean')", (1.0, 0.0), "sppo(beta=0.1, reduction='mean')"),
        ("dpo_shift(beta=0.1, shift=1.0)", (1.0, 0.0), "dpo(beta=0.1)"),
        ("rainbow_po(beta=3.0, mixing=1.0)", (1.0, 0.0), "dpo_norm(beta=3.0)"),
        ("rainbow_po(beta=0.1, mixing=1.0, average=False)", (1.0, 0.0), "dpo(beta=0.1)"),
        ("rainbow_po(beta=3.0, mixing=0.0, home=0.2)", (1.0, 0.0), "simpo(beta=3.0, gamma=0.6)"),
        ("pfl(beta=0.05)", (1.0, 0.0), "pfl(beta=0.05, form='search')"),
        ("humanline(dpo(beta=0.1), low=-1e9, high=1e9)", (1.0, 0.0), "dpo(beta=0.1)"),
        ("humanline(simpo + ipo(beta=0.1), low=-1e9, high=1e9)", (1.0, 0.0), "simpo + ipo(beta=0.1)"),
    ],
)
def test_a_limit_is_another_loss(expression, scores, equal):
    batch = make_batch([replace(row, sw=scores[0], sl=scores[1]) for row in random_rows(6, seed=4)])
    torch.testing.assert_close(parse(expression)(batch).loss, parse(equal)(batch).loss, rtol=1e-9, atol=1e-12)


def test_reward_aware_with_a_soft_label_is_smoothed_dpo_less_the_entropy():
    gap = math.log(0.8 / 0.2)
    batch = make_batch([replace(row, sw=gap, sl=0.0) for row in random_rows(6, seed=4)])
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    smoothed = parse("dpo(beta=0.1, label_smoothing=0.2)")(batch).per_example
    torch.testing.assert_close(parse("reward_aware(beta=0.1)")(batch).per_example, smoothed - entropy)


@pytest.mark.parametrize("distance", ["bwd", "fwd", "sq"])
def test_reward_aware_is_zero_where_the_gaps_agree(distance):
    rows = [replace(row, sw=0.1 * row.uw, sl=0.1 * row.ul) for row in random_rows(6, seed=4)]
    values = parse(f"reward_aware(beta=0.1, distance={distance!r})")(make_batch(rows)).per_example
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)


def test_sampo_draws_as_many_tokens_as_the_shorter_completion_has():
    rows = [replace(row, nw=6, nl=6) for row in random_rows(4)]
    torch.testing.assert_close(parse("sampo")(make_batch(rows)).loss, parse("dpo")(make_batch(rows)).loss)
    # Each token of a completion of 12 beside one of 3 is drawn a quarter of the time.
    batch = make_batch([Row(-20.0, -6.0, -24.0, -6.0, 12, 3)])
    loss = parse("sampo(beta=1e-6)")
    margins = []
    for _ in range(4000):
        value = float(loss(batch).loss)
        margins.append((math.log(2) - value) * 2e6)
    assert sum(margins) / len(margins) == pytest.approx(4.0 * 3 / 12, abs=0.03)
    assert len({round(margin, 4) for margin in margins}) > 100
    loss.eval()
    assert (math.log(2) - float(loss(batch).loss)) * 2e6 == pytest.approx(1.0, abs=1e-4)


def test_humanline_stops_the_gradient_of_tokens_beyond_the_clamp():
    batch = make_batch(random_rows(5), requires_grad=True)
    parse("humanline(dpo, low=-0.1, high=0.2)")(batch).loss.backward()
    scores = batch.chosen
    ratios = (scores.token_logps - scores.ref_token_logps).detach()
    inside = (ratios > -0.1) & (ratios < 0.2) & scores.token_mask
    assert 0 < int(inside.sum()) < int(scores.token_mask.sum())
    assert torch.equal(scores.token_logps.grad != 0, inside)


@pytest.mark.parametrize("inner", ["simpo", "kto", "tdpo", "wpo(dpo)"])
def test_humanline_refuses_what_it_cannot_clamp(inner):
    with pytest.raises(ValueError, match="log-probabilities alone"):
        parse(f"humanline({inner})")
    with pytest.raises(ValueError, match="low must be less than high"):
        parse("humanline(dpo, low=1.0, high=1.0)")


def test_the_bonus_takes_the_completion_of_the_reference():
    rows = [replace(row, from_reference=float(i)) for i, row in enumerate(random_rows(2))]
    values = parse("xpo_bonus")(make_batch(rows)).per_example
    torch.testing.assert_close(values, torch.tensor([rows[0].pl, rows[1].pw], dtype=torch.float64))


@pytest.mark.parametrize("expression", ["mappo", "dpo + 0.5*sppo_soft", "reweighted(mappo)"])
def test_limits_of_scores_are_those_of_the_loss_inside(expression):
    assert parse(expression).limits == {"chosen_score": (0.0, 1.0), "rejected_score": (0.0, 1.0)}


def test_apo_zero_in_two_papers_differs_by_one():
    """2502.01237 writes it without the constant; -0.037477 is its value at the reference vector and beta 0.1."""
    value = float(parse("apo_zero(beta=0.1)")(make_batch([REFERENCE_VECTOR])).loss)
    assert value - 1 == pytest.approx(-0.037477, abs=1e-6)


def test_the_papers_kto_baseline_is_that_of_the_code_with_log_ratios_of_the_other_answers_scaled():
    rows = random_rows(4)
    scaled = [replace(row, pw=row.rw + 0.1 * row.uw) for row in rows]
    paper = parse("kto_forget(beta=0.1, baseline='paper')")(make_batch(rows)).loss
    torch.testing.assert_close(paper, parse("kto_forget(beta=0.1)")(make_batch(scaled)).loss)


def test_npo_kl_has_the_direction_of_the_code_and_of_the_paper():
    assert Need.FORWARD_KL in parse("npo_kl").needs
    assert Need.REVERSE_KL in parse("npo_kl(direction='reverse')").needs


def test_the_later_kernel_code_has_its_divergence_inside_the_sigmoid():
    """Nothing but the divergences' difference is left where log-ratios and kernels agree."""
    loss = parse("kernel_dpo_detonate(divergence='js')")
    assert (loss.gamma, loss.alpha, loss.link, loss.inside) == (0.5, 0.5, "logistic", True)
    rows = [replace(row, rw=row.pw, rl=row.pl) for row in random_rows(3)]
    batch = make_batch(rows)
    batch = replace(batch, rejected=replace(batch.rejected, hidden=batch.chosen.hidden,
                                            prompt_hidden=batch.chosen.prompt_hidden))  # fmt: skip
    expected = torch.nn.functional.softplus(0.5 * loss.distance(batch))
    torch.testing.assert_close(loss(batch).per_example, expected)
