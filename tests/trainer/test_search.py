"""`hyperparameter_search`: each trial is a run of its own, and the best one is returned."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.safety.errors import UsageError
from tests.tiny import make_model
from tests.trainer.runs import make_pairs, save_model, settings

optuna = pytest.importorskip("optuna")


def trainer_of(folder: Path, **options) -> PreferenceTrainer:
    args = PreferenceConfig(**{**settings(folder), "max_steps": 2, "loss": "dpo(beta=0.1)", **options})
    return PreferenceTrainer(
        save_model(folder), args=args, train_dataset=make_pairs(12), eval_dataset=make_pairs(6, 1)
    )


def margin(metrics):
    return metrics["eval_ratios/chosen"] - metrics["eval_ratios/rejected"]


def test_a_search_returns_the_trial_that_is_best_when_it_is_run_alone(tmp_path):
    choices = [{"learning_rate": 1e-3, "loss": "dpo(beta=0.1)"}, {"learning_rate": 1e-2, "loss": "ipo(beta=0.5)"}]
    trainer = trainer_of(tmp_path)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    best = trainer.hyperparameter_search(
        lambda trial: choices[trial.suggest_categorical("choice", [0, 1])], margin, 2, "maximize", backend="optuna",
        sampler=optuna.samplers.GridSampler({"choice": [0, 1]}, seed=0),
    )  # fmt: skip
    alone = []
    for number, choice in enumerate(choices):
        again = trainer_of(tmp_path, output_dir=str(tmp_path / f"alone-{number}"), **choice)
        again.train()
        alone.append(margin(again.evaluate()))
    assert best.objective == max(alone)
    assert choices[best.hyperparameters["choice"]] == choices[alone.index(max(alone))]
    assert str(trainer.objective).startswith("dpo(beta=0.1")  # this trainer is as it was
    assert all(value.equal(weights[name]) for name, value in trainer.model.state_dict().items())


def refused(trainer: PreferenceTrainer, message: str, **keywords) -> None:
    with pytest.raises(UsageError, match=message):
        trainer.hyperparameter_search(n_trials=1, **keywords)


def test_what_cannot_be_searched_is_told(tmp_path):
    trainer = trainer_of(tmp_path)
    refused(trainer, "maximized: a loss's own value", direction="minimize")
    refused(trainer, "backend='optuna'", backend="ray")
    refused(trainer, "pass direction", compute_objective=margin)
    refused(trainer, "typo is not an argument", hp_space=lambda trial: {"typo": 1})
    refused(trainer, "Did you mean 'learning_rate'", hp_space=lambda trial: {"learning_rat": 1e-3})
    model = make_model("llama", 0)
    model.config._name_or_path = save_model(tmp_path)
    args = PreferenceConfig(**settings(tmp_path), loss="simpo")
    tokenizer = trainer.processing_class
    given = PreferenceTrainer(model, args=args, train_dataset=make_pairs(12), processing_class=tokenizer)
    blind = PreferenceTrainer(
        save_model(tmp_path), args=args, train_dataset=make_pairs(12), processing_class=tokenizer
    )
    refused(blind, "give the trainer an eval_dataset", hp_space=lambda trial: {"learning_rate": 1e-3})
    refused(given, "pass the model's name", hp_space=lambda trial: {"learning_rate": 1e-3})
