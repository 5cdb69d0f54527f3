"""What a subclass overrides around `LossMixin` is called, or it is said that it is not."""

from __future__ import annotations

import logging

import pytest
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer

from prefopt import LossMixin, PreferenceTrainer
from tests.trainer.runs import make_labelled, make_pairs, make_trainer, save_model, train

LOGGER = "prefopt.trainer.overrides"


class Plus(DPOTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        type(self).calls += 1
        made = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (made[0] + 100.0, made[1]) if return_outputs else made + 100.0


class Above(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + 100.0


class AboveInner(PreferenceTrainer):
    def _compute_loss(self, model, inputs, return_outputs=False):
        return super()._compute_loss(model, inputs, return_outputs) + 100.0


class Below(LossMixin, Plus): ...


class Extra:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + 100.0


class Beside(LossMixin, Extra, DPOTrainer): ...


@pytest.mark.parametrize("trainer", [Below, Beside, Above, AboveInner])
def test_an_override_of_the_loss_runs_around_the_objective(tmp_path, trainer):
    """Training loss and evaluation are the override's, gradients the objective's."""
    mine = train(tmp_path, trainer=trainer, loss="ipo(beta=0.1)", max_steps=3)
    plain = train(tmp_path, loss="ipo(beta=0.1)", max_steps=3)
    for entry, other in zip(mine, plain, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"] + 100, rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


class Moving(PreferenceTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize(("loss", "rows"), [("dpo", make_pairs), ("kto", make_labelled)])
def test_an_override_gets_a_batch_of_tensors(tmp_path, loss, rows):
    trainer = make_trainer(tmp_path, trainer=Moving, loss=loss, max_steps=1, train_dataset=rows(8))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    if loss == "dpo":
        assert trainer.evaluate(rows(6))["eval_loss"] > 0


def test_an_evaluation_counts_what_an_override_adds(tmp_path):
    trainer = make_trainer(tmp_path, trainer=Below, loss="dpo", max_steps=1)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(100.693, abs=0.01)
    assert Below.calls > 0


def test_a_plain_dpo_config_and_trl_arguments_do(tmp_path):
    entries = train(tmp_path, trainer=Below, config=DPOConfig, max_steps=1, trainer_options={"loss": "dpo(beta=0.1)"})
    assert entries[0]["loss"] == pytest.approx(100.693, abs=0.01)


def test_an_override_that_leaves_the_objective_out_is_refused(tmp_path):
    class Own(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss

    class Mixed(LossMixin, Own): ...

    with pytest.raises(ValueError, match=r"Own\.compute_loss does not call super\(\)\.compute_loss"):
        train(tmp_path, trainer=Mixed, loss="dpo", max_steps=1)


@pytest.mark.parametrize("name", ["_compute_loss", "_prepare_dataset", "compute_ref_log_probs", "dpo_loss"])
def test_an_override_that_is_never_called_is_named(tmp_path, caplog, name):
    own = type("Own", (DPOTrainer,), {name: lambda self, *arguments, **keywords: None})
    mixed = type("Mixed", (LossMixin, own), {})
    with caplog.at_level(logging.WARNING, LOGGER):
        make_trainer(tmp_path, trainer=mixed, loss="dpo")
    assert f"Own.{name} is never called" in caplog.text


def test_trainers_without_overrides_get_no_word(tmp_path, caplog):
    class Logs(PreferenceTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "mine": 1.0}, start_time)

        def dpo_metrics(self):
            return {}

    with caplog.at_level(logging.WARNING, LOGGER):
        for trainer in (PreferenceTrainer, Logs, Above, Below):
            make_trainer(tmp_path, trainer=trainer, loss="dpo")
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_conflict_free_refuses_an_override_whose_gradient_it_would_drop(tmp_path):
    for trainer in (Above, Below):
        with pytest.raises(ValueError, match="would have no effect"):
            make_trainer(tmp_path, trainer=trainer, loss="conflict_free(dpo(beta=0.1) + sft)")


@pytest.mark.parametrize("other", [SFTTrainer, CPOTrainer])
def test_other_trainers_are_refused_in_one_sentence(tmp_path, other):
    mixed = type("Mixed", (LossMixin, other), {})
    with pytest.raises(TypeError, match=rf"puts LossMixin on {other.__name__}; it works only on trl\.DPOTrainer"):
        mixed(save_model(tmp_path), loss="kto")


def test_the_wrong_order_is_refused_where_the_class_is_written():
    with pytest.raises(TypeError, match=r"class Mixed\(LossMixin, Plus\)"):
        type("Mixed", (Plus, LossMixin), {})
