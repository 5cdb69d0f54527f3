"""The papers' experiments: the cheap ones again, at reduced size.

Those that take more than a second are marked slow; `prefopt reproduce` reports the same numbers.
"""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.losses import DPO, HDPO, IPO, NPO, GradientAscent
from prefopt.reproduction.experiments import (
    addition,
    cringe,
    discopop,
    dpo,
    entanglement,
    hdpo,
    hypo,
    inpo,
    ipo,
    kernel,
    logic,
    npo,
    npo_theorem,
    orpo_asft,
    reasoning,
    rounds,
    rpo,
    superhf,
    superhf_text,
    tables,
    tiny_lm,
)
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.paper import read_papers
from prefopt.reproduction.verdict import verdict_of

CLAIMS = {claim.id: claim for paper in read_papers() for claim in paper.claims if claim.check}


def hold(outcomes: list[Outcome]) -> list[str]:
    """The claims that do not hold, with what was measured; those with rules are decided by them."""
    return [
        f"{outcome.claim}: {outcome.measured}"
        for outcome in outcomes
        if (verdict_of(CLAIMS[outcome.claim], outcome) != "holds" if outcome.holds is None else not outcome.holds)
    ]


# ---- tables of responses --------------------------------------------------------------------------------------------


def test_minima_of_dpo_and_smoothed_dpo_and_hinge():
    assert not hold([dpo.optimum(), *dpo.growth(steps=1600)])


@pytest.mark.slow
def test_ipo_has_a_finite_minimiser_where_dpo_has_none():
    assert not hold([*ipo.population_minimiser(), *ipo.two_forms()])


def test_ipo_keeps_a_bandit_apart_from_certainty():
    assert float(ipo.bandit(DPO(0.1), steps=800, seeds=2)[:, 0].min()) > 0.99
    regularised = ipo.bandit(IPO(0.5), steps=800, seeds=2)[:, 0]
    exact = 1 / (1 + math.exp(-2 / 3) + math.exp(-4 / 3))
    assert float(regularised.mean()) == pytest.approx(exact, abs=0.03)


def test_hdpo_reaches_its_closed_form_and_entropy_rises_with_alpha():
    rewards, reference = hdpo.problem(seed=3)
    found = [tables.bradley_terry_optimum(HDPO(0.5, alpha), rewards, reference) for alpha in (0.8, 1.0, 1.2)]
    exact = [hdpo.closed_form(rewards, reference, 0.5, alpha) for alpha in (0.8, 1.0, 1.2)]
    assert max(tables.total_variation(a, b) for a, b in zip(found, exact, strict=True)) < 1e-6
    entropies = [float(tables.entropy(logps)) for logps in found]
    assert entropies[0] < entropies[1] < entropies[2]


def test_a_gaussian_locks_on_one_mode_at_small_alpha():
    means, deviations = hdpo.gaussian_fits(2.5, [0.5, 1.0])
    assert means[0] > 2
    assert means[1] < 0.25
    assert deviations[0] < 1 < deviations[1]


@pytest.mark.slow
def test_discopop_has_a_hill_and_its_relatives_their_bounds():
    assert not hold([*discopop.shape(), *discopop.relatives()])


def test_inpo_on_rock_paper_scissors():
    assert not hold([*inpo.convergence(), *inpo.loss_finds_update(iterations=3, pairs=50_000), inpo.bradley_terry()])


@pytest.mark.slow
def test_hypo_collapses_without_the_kl_and_not_with_it():
    assert hypo.trained(0.0, steps=3000)[1] > 0.999
    w, uncovered, kl, _ = hypo.trained(1.0, steps=1000)
    assert (w, uncovered, kl) == pytest.approx((0.0749, 0.3586, 0.0019), abs=1e-4)


def test_hypo_gradient_is_unbiased():
    claims = hypo.unbiased(samples=20_000)
    assert [claim.holds for claim in claims if claim.claim != "baseline-variance"] == [True, True]


def test_rounds_settle_with_inpo_and_not_with_iterated_dpo_and_the_online_kl_is_exact():
    assert not hold([*rounds.game(count=12, prompts=600), rounds.exact_gradient()])


def test_orpo_and_asft_identities():
    claims = [*orpo_asft.identities(points=60), orpo_asft.prompt_constant(), orpo_asft.small_beta()]
    assert not hold(claims)


def test_rpo_pushes_the_chosen_harder_than_the_rejected():
    assert not hold([rpo.gradient_ratio()])


def test_superhf_filters_and_its_prior_keeps_entropy():
    assert superhf.best_of(16, draws=50_000) == pytest.approx(1.766, abs=0.02)
    start, _, free, _ = superhf.bandit(0.0, seed=0, steps=300)
    held = superhf.bandit(0.35, seed=0, steps=300)[2]
    assert free < held < start


# ---- unlearning -----------------------------------------------------------------------------------------------------


def test_gradient_ascent_is_linear_and_npo_logarithmic():
    paths = [npo.scalar_path(loss, 800) for loss in (GradientAscent("sum"), NPO(1.0), NPO(0.1))]
    expected = [(-0.92, -30.505, -70.505), (-0.293, -4.033, -4.973), (-0.835, -16.935, -25.408)]
    for path, values in zip(paths, expected, strict=True):
        assert path[[100, 400, 800]].tolist() == pytest.approx(values, abs=6e-4)


def test_the_theorems_distances_are_linear_and_logarithmic():
    linear, constant, *_ = npo_theorem.theorem(steps=400, counts=(2, 8))
    assert not hold([linear, constant])


@pytest.mark.slow
def test_npo_keeps_more_of_the_retain_points_than_gradient_ascent():
    """The paper's synthetic experiment, one seed and a short one."""
    world = npo.make_world(1.0, seeds=1, fit_steps=2000)
    methods = npo.methods(separated=True)
    records = {name: npo.unlearn(world, *methods[name], 1000, 25) for name in ("GA", "NPO", "NPO+RT", "GradDiff")}
    forget, retain = ({name: float(r[key][-1]) for name, r in records.items()} for key in ("forget", "retain"))
    rise = {name: forget[name] / float(r["forget"].min()) for name, r in records.items()}
    assert rise["GA"] > 2 * rise["NPO"]
    assert rise["GradDiff"] > 2 * rise["NPO+RT"]
    assert retain["NPO"] < retain["GA"]
    assert retain["NPO+RT"] < retain["GradDiff"]


def test_on_random_features_the_distance_falls_with_beta():
    world = npo.make_world(1.0, seeds=1, fit_steps=150)
    moved = [
        float(npo.unlearn(world, npo.objective(loss), 5e-3, 400, 200)["distance"][-1])
        for loss in (GradientAscent("mean"), NPO(0.1), NPO(1.0))
    ]
    assert moved[0] > moved[1] > moved[2] > 0


# ---- tiny language models -------------------------------------------------------------------------------------------


def test_pushes_and_conditions_of_gradient_entanglement():
    assert not hold([entanglement.table(), entanglement.conditions(pairs=8), *entanglement.suffixes(pairs=40)[:1]])


def test_repetition_counts_word_triples_seen_before():
    assert cringe.repetition("a b c d") == 0
    assert cringe.repetition("a b c a b c") == pytest.approx(1 / 4)
    assert cringe.repetition("a b") == 0


def test_perplexity_at_a_level_is_interpolated():
    path = [(0.8, 4.0), (0.6, 5.0), (0.2, 7.0)]
    assert cringe.perplexity_at(path, 0.4) == pytest.approx(6.0)
    assert math.isnan(cringe.perplexity_at(path, 0.1))


def test_pairwise_cringe_lets_go_of_pairs_that_are_told_apart():
    text = cringe.Text()
    claim = cringe.gate_and_gradient(text, tiny_lm.TinyLM(len(text.symbols), hidden=16))
    assert claim.holds, claim.measured


def test_addition_is_checked_by_its_answer_alone():
    assert addition.answer(37, 58) == "15 09 095; "
    said = addition.encode(["15 09 095; ", "99 99 095; ", "15 09 096; "])
    assert addition.is_right(said, [(37, 58)] * 3).tolist() == [True, True, False]
    rows = addition.rows(addition.prompts_of([(37, 58)]), said[:1])
    assert int(rows.mask.sum()) == len("15 09 095;")


def test_sums_of_a_tiny_model_are_its_log_probabilities():
    model = tiny_lm.TinyLM(5, hidden=8)
    tokens = torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[False, False, True, True]])
    logps = torch.log_softmax(model(tokens[:, :-1]), -1)
    expected = logps[0, 1, 2] + logps[0, 2, 3]
    torch.testing.assert_close(tiny_lm.sums(model, tiny_lm.Rows(tokens, mask))[0], expected)


def test_pass_at_k_is_the_chance_that_one_of_k_samples_is_right():
    right = torch.tensor([[True, False, False, False], [False] * 4, [True] * 4])
    assert reasoning.pass_at(right, 1) == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert reasoning.pass_at(right, 2) == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert reasoning.pass_at(right, 4) == pytest.approx(2 / 3)


def test_seeds_of_the_addition_claims_share_no_problem():
    drawn = [
        problem for seed in reasoning.SEEDS for number in range(3) for problem in reasoning.problems_of(seed, number)
    ]
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & set(addition.HELD_OUT)


def test_superhf_reads_the_kl_of_the_whole_distribution():
    text = cringe.read_text()
    model, other = (tiny_lm.TinyLM(len(text.symbols), hidden=8, seed=seed) for seed in (0, 1))
    prompts = text.windows(text.train, 2, torch.Generator().manual_seed(0)).tokens[:, : cringe.PROMPT]
    own = superhf_text.continued(model, prompts, torch.Generator().manual_seed(0))
    assert float(superhf_text.scored(model, model, own).token_forward_kl.abs().max()) == pytest.approx(0, abs=1e-6)
    assert float(superhf_text.scored(model, other, own).token_forward_kl.min()) > 0
    said = text.decode(own.tokens[:, cringe.PROMPT :])
    expected = [answer.count("e") / superhf_text.LENGTH for answer in said]
    assert superhf_text.rewards(text, own).tolist() == pytest.approx(expected)


def test_a_curve_is_thinned_and_keeps_its_ends():
    points = tables.curve(torch.arange(1001.0))
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1000.0, 1000.0)
    assert len(points) <= 202


# ---- the logic of preference losses ---------------------------------------------------------------------------------


def test_known_losses_are_odds_of_formulas_and_structures_are_ordered():
    assert hold([logic.identities(points=200), logic.order(points=50)]) == []


@pytest.mark.slow
def test_what_asks_for_less_leaves_the_chosen_response_less_likely():
    assert hold([logic.spare_arms(steps=1000)]) == []


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_identities_of_kernels_and_divergences_and_the_constant_margin():
    assert hold([kernel.scale(steps=20), *kernel.limits(points=200), *kernel.constant(steps=50)]) == []


@pytest.mark.slow
def test_a_mixture_collapses_without_its_entropy_term():
    assert kernel.collapse().holds


def test_a_kernel_that_knows_more_ranks_better_than_the_policy_alone():
    hybrid, alone = torch.tensor([kernel.learned(seed, 4.0) for seed in range(3)]).mean(0)
    assert hybrid > alone + 0.05
