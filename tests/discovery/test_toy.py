"""The toy: exact measures, independent betas and seeds, and a reward that good losses find."""

from __future__ import annotations

import torch

from prefopt.discovery import read
from prefopt.discovery.search import LRML, SEEDS
from prefopt.discovery.toy import CLEAR, best_value, make_worlds, measure, train

WORLDS = make_worlds((0, 1))


def test_the_reference_is_the_origin():
    outcome = measure(torch.zeros(2, 2, WORLDS.features.shape[-1], dtype=torch.float64), WORLDS, (0.1, 1.0))
    for values in (outcome.reward, outcome.kl, outcome.length, outcome.value):
        torch.testing.assert_close(values, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_best_value_is_that_of_the_tilted_reference():
    beta = 0.5
    best = torch.log_softmax(WORLDS.ref_logps + CLEAR * WORLDS.gold / beta, -1)
    policy = best.exp()
    value = (policy * (CLEAR * WORLDS.gold - beta * (best - WORLDS.ref_logps))).sum(-1).mean(-1)
    torch.testing.assert_close(best_value(WORLDS, [beta])[0], value)


def test_betas_and_seeds_do_not_act_on_one_another():
    node = read(SEEDS["dpo"])
    together = train(node, WORLDS, (0.05, 0.5), 12)
    alone = train(node, make_worlds((1,)), (0.5,), 12)
    torch.testing.assert_close(together.reward[1:, 1:], alone.reward)
    torch.testing.assert_close(together.kl[1:, 1:], alone.kl)


def test_dpo_learns_the_gold_reward_and_beta_holds_it_back():
    outcome = train(read(SEEDS["dpo"]), WORLDS, (0.05, 1.0), 60)
    assert outcome.reward.min() > 0.5
    assert (outcome.kl[0] > outcome.kl[1]).all()
    assert ((outcome.value > 0.3) & (outcome.value < 1)).all()


def test_discopop_collapses_at_small_beta():
    outcome = train(read(LRML), WORLDS, (0.01, 1.0), 60)
    assert (outcome.reward[0] < 0).all()
    assert (outcome.reward[1] > 0.5).all()


def test_a_world_depends_on_its_seed_and_family_alone():
    torch.testing.assert_close(make_worlds((1,)).gold, WORLDS.gold[1:], rtol=0, atol=0)
    assert not torch.equal(make_worlds((1,), "bent").gold, WORLDS.gold[1:])
