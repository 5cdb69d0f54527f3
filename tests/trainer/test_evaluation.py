"""Evaluations and predictions count their own rows and nothing else."""

from __future__ import annotations

import pytest

from tests.trainer.runs import make_labelled, make_pairs, make_trainer


def trained(tmp_path, **options):
    trainer = make_trainer(tmp_path, **{"loss": "dpo", "max_steps": 3, "learning_rate": 1e-2, **options})
    trainer.train()
    return trainer


def numbers(metrics, prefix="eval"):
    times = ("runtime", "per_second", "model_preparation_time", "num_tokens")
    return {
        k.removeprefix(f"{prefix}_"): v for k, v in metrics.items() if k.startswith(prefix) and not k.endswith(times)
    }


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_predictions_do_not_count_in_evaluations_nor_the_reverse(tmp_path, loss):
    make = make_labelled if loss == "kto" else make_pairs
    trainer = trained(tmp_path, loss=loss, train_dataset=make(16))
    valid, other = make(8, seed=1), make(8, seed=2)
    evaluated = numbers(trainer.evaluate(valid))
    predicted = numbers(trainer.predict(other).metrics, "test")
    assert numbers(trainer.evaluate(valid)) == pytest.approx(evaluated, rel=1e-5, abs=1e-5)
    assert numbers(trainer.evaluate(other)) == pytest.approx(predicted, rel=1e-5, abs=1e-5)
    assert predicted["loss"] != pytest.approx(evaluated["loss"], rel=1e-3)


@pytest.mark.parametrize("by", ["evaluate", "predict"])
def test_what_was_interrupted_does_not_count(tmp_path, by):
    trainer = trained(tmp_path)
    valid, other = make_pairs(8, seed=1), make_pairs(8, seed=2)
    before = numbers(trainer.evaluate(valid))
    step, calls = trainer.prediction_step, []

    def interrupted(*arguments, **keywords):
        made = step(*arguments, **keywords)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return made

    trainer.prediction_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        getattr(trainer, by)(other)
    trainer.prediction_step = step
    trainer.log({"mine": 1.0})
    assert "eval_loss" not in trainer.state.log_history[-1]
    assert numbers(trainer.evaluate(valid)) == pytest.approx(before)


def test_predict_takes_raw_rows_as_evaluate_does(tmp_path):
    trainer = trained(tmp_path)
    raw = make_pairs(8, seed=1)
    made = trainer.predict(raw, metric_key_prefix="held_out")
    assert made.metrics["held_out_loss"] == pytest.approx(trainer.evaluate(raw)["eval_loss"])
    assert made.predictions is not None


def test_predict_says_that_precomputed_references_are_missing(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", precompute_ref_log_probs=True, train_dataset=make_pairs(8))
    with pytest.raises(ValueError, match="pass them to evaluate"):
        trainer.predict(make_pairs(8, seed=1))
    assert "test_loss" in trainer.predict(trainer.train_dataset).metrics
