"""Losses with parameters of their own: trained at their own rate, on the model's schedule, saved, resumed, logged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor, AdafactorSchedule

from prefopt.losses import Need, PairLoss
from tests.trainer.runs import make_pairs, make_trainer, save_model


class Tempered(PairLoss):
    """DPO whose beta is learned, with a prior that keeps it near 1: one number, whose gradient is known."""

    needs = Need.REFERENCE
    batchwise = False

    def __init__(self, size: int = 1):
        super().__init__()
        self.size = size
        self.log_beta = nn.Parameter(torch.zeros(size))

    def per_example(self, batch):
        beta = self.log_beta.exp().mean()
        return -nn.functional.logsigmoid(beta * (batch.chosen.ratios - batch.rejected.ratios)) + (beta - 2) ** 2


def run(folder, loss=None, resume=None, **options):
    trainer = make_trainer(
        folder, train_dataset=make_pairs(16), trainer_options={"loss": loss or Tempered()},
        **{"max_steps": 6, "lr_scheduler_type": "constant", **options},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_parameters_move_at_their_own_learning_rate(tmp_path):
    slow, fast = (run(tmp_path, loss_learning_rate=rate).objective for rate in (1e-3, 1e-1))
    # AdamW's first steps are as long as the learning rate, towards the prior's 2.
    assert float(slow.log_beta.detach()) == pytest.approx(6e-3, rel=0.05)
    assert float(fast.log_beta.detach()) > 0.3
    assert float(run(tmp_path, learning_rate=2e-3).objective.log_beta) == pytest.approx(12e-3, rel=0.05)


def test_a_rate_of_zero_leaves_them_alone(tmp_path):
    assert float(run(tmp_path, loss_learning_rate=0.0).objective.log_beta) == 0


def test_they_follow_the_models_schedule(tmp_path):
    trainer = run(tmp_path, loss_learning_rate=1e-2, lr_scheduler_type="linear")
    steps = torch.tensor([0.0, *logged(trainer, "learned/log_beta")]).diff()
    assert steps.tolist() == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)], rel=0.05)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor"])
def test_their_rate_holds_with_an_optimizer_of_ones_own(tmp_path, optimizer):
    """Whatever the model's own rate: 2e-3 where the arguments say 1e-6, or Adafactor's, which is in no argument."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    if optimizer == "AdamW":
        optimizers = (torch.optim.AdamW(model.parameters(), lr=2e-3), None)
    else:
        own = Adafactor(model.parameters(), relative_step=True, warmup_init=True, lr=None)
        optimizers = (own, AdafactorSchedule(own))
    trainer = make_trainer(
        tmp_path, model=model, loss_learning_rate=1e-3, learning_rate=1e-6, max_steps=6,
        lr_scheduler_type="constant", train_dataset=make_pairs(16),
        trainer_options={"loss": Tempered(), "optimizers": optimizers},
    )  # fmt: skip
    trainer.train()
    assert float(trainer.objective.log_beta.detach()) == pytest.approx(6e-3, rel=0.05)


def test_small_ones_are_logged_one_by_one_large_ones_in_brief(tmp_path):
    small, large = run(tmp_path, Tempered(3), max_steps=1), run(tmp_path, Tempered(30), max_steps=1)
    assert {f"learned/log_beta/{i}" for i in range(3)} < set(small.state.log_history[0])
    assert {"learned/log_beta/mean", "learned/log_beta/std"} < set(large.state.log_history[0])


def test_accumulated_micro_batches_count_as_one_batch(tmp_path):
    rates = {"loss_learning_rate": 1e-2, "max_steps": 3}
    whole = run(tmp_path, per_device_train_batch_size=8, **rates)
    parts = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **rates)
    budget = run(tmp_path, per_device_train_batch_size=8, token_budget=60, **rates)
    for other in (parts, budget):
        assert logged(other, "learned/log_beta") == pytest.approx(logged(whole, "learned/log_beta"), rel=1e-4)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    options = {"loss_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path, **options)
    folder = tmp_path / "run" / "checkpoint-3"
    assert set(load_file(folder / "objective.safetensors")) == {"log_beta"}
    assert load_file(folder / "objective_optimizer.safetensors")["log_beta.step"] == 3
    resumed = run(tmp_path, resume=str(folder), **options)
    assert torch.equal(resumed.objective.log_beta, whole.objective.log_beta)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_evaluation_does_not_move_them(tmp_path):
    trainer = make_trainer(
        tmp_path, train_dataset=make_pairs(8), trainer_options={"loss": Tempered(), "eval_dataset": make_pairs(8, 1)}
    )
    trainer.evaluate()
    assert float(trainer.objective.log_beta.detach()) == 0
    assert trainer.objective.log_beta.grad is None


def test_a_negative_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_learning_rate must be 0 or more"):
        run(tmp_path, loss_learning_rate=-1.0)
