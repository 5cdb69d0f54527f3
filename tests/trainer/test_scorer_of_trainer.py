"""What the trainer's scorer is asked: with which models, and how often."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoModelForCausalLM

from prefopt.losses import parse
from tests.trainer.runs import make_pairs, make_trainer, save_model


def test_a_reference_that_is_set_later_is_the_one_compared_with(tmp_path):
    other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, seed=5)).eval()
    losses = []
    for options in ({"ref_model": other}, {}):
        trainer = make_trainer(tmp_path, loss="dpo", max_steps=1, step0_check="off", trainer_options=options)
        trainer.ref_model = other
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] != pytest.approx(0.6931, abs=1e-3)


def test_an_objective_that_is_set_later_is_scored_with_its_own_needs(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", trainer_options={"eval_dataset": make_pairs(8)})
    trainer.objective = parse("tdpo")
    assert trainer.evaluate()["eval_loss"] > 0


def test_precomputing_calls_the_reference_once_a_batch(tmp_path, monkeypatch):
    """How its head can be called is tried at the first batch alone."""
    calls = []
    of_class = type(AutoModelForCausalLM.from_pretrained(save_model(tmp_path)))
    forward = of_class.forward

    @functools.wraps(forward)
    def counted(*arguments, **keywords):
        calls.append(1)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(of_class, "forward", counted)
    make_trainer(tmp_path, loss="dpo", precompute_ref_log_probs=True, precompute_ref_batch_size=4)
    assert len(calls) == 10 + 2
