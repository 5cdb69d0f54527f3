"""A budget of tokens changes how a batch goes through the model, and nothing that comes of it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from prefopt.losses import PairLoss, parse
from prefopt.scoring.layout import Layout
from tests.trainer.runs import make_labelled, make_pairs, make_trainer, save_model

LOSSES = ["dpo + 0.1*sft", "ipo(beta=0.5)", "simpo", "tdpo", "ld_dpo(alpha=0.5)", "kernel_dpo(divergence='js')"]
ACTING_ON_ONE_ANOTHER = [
    "aot", "sft(nll='token')", "bco", "beta_dpo(keep=0.8)", "kl_retain + dpo", "reweighted(dpo)",
    "kernel_dpo(kernel='mahalanobis', divergence='wasserstein')",
]  # fmt: skip


def run(folder, budget: int | None, **options):
    """The steps' entries, the weights, and how many tokens each call of the policy with a gradient took."""
    trainer = make_trainer(
        folder, token_budget=budget, max_steps=3, per_device_train_batch_size=8, seed=1, learning_rate=1e-2,
        output_dir=str(folder / f"run-{budget}"), **options,
    )  # fmt: skip
    sizes = []

    def count(module, arguments, keywords):
        if torch.is_grad_enabled():
            sizes.append(keywords["input_ids"].numel())

    # TRL scores nothing before it trains; what the layout tries out has no gradient.
    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return [entry for entry in trainer.state.log_history if "loss" in entry], weights, sizes


def assert_same(one, two):
    (log, weights, _), (log_2, weights_2, _) = one, two
    for mine, theirs in zip(log, log_2, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    # Adam makes whole steps of gradients that are rounding alone, so that single weights may be further apart.
    assert float((weights - weights_2).norm() / weights_2.norm()) < 1e-4


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_run_in_parts(tmp_path, loss, layout):
    data = make_pairs(24, weight=[0.5 + i % 3 for i in range(24)])
    budget = 150
    whole = run(tmp_path, None, loss=loss, train_dataset=data, layout=layout)
    parts = run(tmp_path, budget, loss=loss, train_dataset=data, layout=layout)
    assert_same(parts, whole)
    assert len(whole[2]) == 3
    assert len(parts[2]) >= 6
    assert max(parts[2]) <= budget < max(whole[2])


@pytest.mark.parametrize("loss", ACTING_ON_ONE_ANOTHER)
def test_losses_over_the_batch_see_all_of_it(tmp_path, loss):
    whole = run(tmp_path, None, loss=loss)
    parts = run(tmp_path, 120, loss=loss)
    assert_same(parts, whole)
    # Each part goes through twice, once to be scored and once for its gradient.
    assert len(parts[2]) >= 2 * 2 * 3
    assert max(parts[2]) <= 120


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_single_completions(tmp_path, loss):
    data = make_labelled(24)
    assert_same(run(tmp_path, 60, loss=loss, train_dataset=data), run(tmp_path, None, loss=loss, train_dataset=data))


def test_with_accumulation_adapters_and_a_reference_that_is_kept(tmp_path):
    runs = []
    for budget in (None, 100):
        options = {"gradient_accumulation_steps": 2, "reference_cache": str(tmp_path / "kept")}
        adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        runs.append(run(tmp_path, budget, loss="dpo", trainer_options={"peft_config": adapter}, **options))
    assert_same(*runs)


def test_every_step_learns_from_the_examples_it_would_have(tmp_path):
    """The order of the examples stays random, and the same, over epochs."""
    orders = []
    for budget in (None, 100):
        trainer = make_trainer(
            tmp_path, loss="dpo", token_budget=budget, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8,
            train_dataset=make_pairs(16),
        )  # fmt: skip
        steps, taken = [], trainer.training_step

        def keep(model, inputs, *rest, steps=steps, taken=taken):
            steps.append(inputs["input_ids"].clone())
            return taken(model, inputs, *rest)

        trainer.training_step = keep
        trainer.train()
        orders.append(steps)
    assert all(torch.equal(one, two) for one, two in zip(*orders, strict=True))
    assert not torch.equal(orders[0][0], orders[0][2])  # epochs differ


def test_what_cannot_be_kept_is_said(tmp_path):
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        make_trainer(tmp_path, loss="dpo", token_budget=0)
    trainer = make_trainer(tmp_path, loss="aot", token_budget=100, layout="padded")
    with pytest.raises(ValueError, match=r"in the padded layout \(asked for\): its examples act on one another"):
        trainer.train()


def test_what_cannot_be_kept_on_several_processes_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Layout, "one_call", property(lambda self: True, lambda self, value: None), raising=False)
    with pytest.raises(ValueError, match=r"cannot be kept for aot.*the model may be called only once a step"):
        make_trainer(tmp_path, loss="aot", token_budget=100)
    trainer = make_trainer(tmp_path, loss="sft", token_budget=100, train_dataset=make_labelled(8))
    with pytest.raises(ValueError, match="cannot be kept for single completions"):
        trainer.train()


def test_experts_that_balance_their_load_are_refused(tmp_path):
    with pytest.raises(ValueError, match="load-balancing loss of experts"):
        make_trainer(tmp_path, loss="dpo", token_budget=100, model=save_model(tmp_path, "moe"))


def test_half_precision_is_scored_in_trees_too(tmp_path):
    trainer = make_trainer(tmp_path, loss="dpo", token_budget=100, max_steps=1, bf16=True, layout="tree")
    trainer.train()
    assert trainer._scorer.layout.masks == "packed"


def test_a_loss_from_elsewhere_is_not_taken_apart_unless_it_says_so():
    class Centred(PairLoss):
        def per_example(self, batch):
            return batch.chosen.logps - batch.chosen.logps.mean()

    class Plain(PairLoss):
        batchwise = False

        def per_example(self, batch):
            return -batch.chosen.logps

    assert not Centred().separable
    assert not (Centred() + parse("sft")).separable
    assert (Plain() + parse("sft")).separable
