"""Kernelized objectives through the trainer: every kernel learns, logs and evaluates, on vectors of either kind.

What two processes make of them is in `test_engines.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from prefopt.losses.kernel_functions import KERNELS
from prefopt.losses.scores import EMBEDDINGS
from tests.trainer.engine_processes import embedded
from tests.trainer.runs import make_pairs, make_trainer

LOSSES = [f"kernel_dpo({kernel!r}, 'js', alpha=1.0, gamma=3.0{{}})" for kernel in KERNELS]
LOSSES.append("hmk('js', alpha=1.0, gamma=3.0{})")
WEIGHTS = {f"weights/{kernel}" for kernel in KERNELS}

of_each = pytest.mark.parametrize("loss", LOSSES, ids=[*KERNELS, "hmk"])


def run(folder, loss, resume=None, data=embedded, **options):
    rows = data(16)
    trainer = make_trainer(
        folder, loss=loss, train_dataset=rows, trainer_options={"eval_dataset": rows},
        **{"max_steps": 20, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, **options},
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    return trainer, before, trainer.evaluate()


def steps(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def check_weights(trainer, before, after):
    assert [before[f"eval_{name}"] for name in WEIGHTS] == pytest.approx([0.25] * 4)
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert math.fsum(entry[name] for name in WEIGHTS) == pytest.approx(1, abs=1e-5)
    assert max(abs(after[f"eval_{name}"] - 0.25) for name in WEIGHTS) > 0.003


@of_each
@pytest.mark.parametrize("embeddings", ["hidden", "given"])
def test_it_trains_logs_and_evaluates(tmp_path, loss, embeddings):
    trainer, before, after = run(tmp_path, loss.format(f", embeddings={embeddings!r}"))
    assert len(steps(trainer, "kernel/margins")) == len(steps(trainer, "kernel/divergence")) == 20
    # The policy starts as the reference and leaves it.
    assert before["eval_kernel/divergence"] == pytest.approx(0, abs=1e-6)
    assert 1e-4 < after["eval_kernel/divergence"] < math.log(2)
    assert after["eval_loss"] < before["eval_loss"] - 0.01
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    if loss.startswith("hmk"):
        check_weights(trainer, before, after)
    else:
        assert not WEIGHTS & {name for entry in trainer.state.log_history for name in entry}


@of_each
def test_hidden_states_learn_the_kernels_margin_and_given_vectors_cannot(tmp_path, loss):
    """beta is so small that what is learned is learned through the kernel."""
    tiny_beta = ", beta=1e-6, embeddings={!r}, gradient={}"
    _, before, after = run(tmp_path / "a", loss.format(tiny_beta.format("hidden", True)))
    learned = after["eval_kernel/margins"] - before["eval_kernel/margins"]
    assert learned > 0.01
    _, before, after = run(tmp_path / "b", loss.format(tiny_beta.format("hidden", False)))
    # Adam makes full steps of the smallest gradients too, so they drift a little, and differently on each machine.
    assert after["eval_kernel/margins"] == pytest.approx(before["eval_kernel/margins"], abs=learned / 50)
    if not loss.startswith("hmk"):  # whose weights learn from them
        _, before, after = run(tmp_path / "c", loss.format(tiny_beta.format("given", True)))
        assert after["eval_kernel/margins"] == before["eval_kernel/margins"]


def test_given_vectors_and_hidden_states_are_not_mixed_up(tmp_path):
    """A chosen vector that is the prompt's and a rejected one opposite to it: the radial margin is 2, by hand."""
    rows = make_pairs(16)
    vectors = dict(zip(EMBEDDINGS, ([1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]), strict=True))
    for name, vector in vectors.items():
        rows = rows.add_column(name, [vector] * 16)
    _, before, _ = run(tmp_path, "kernel_dpo(alpha=0.0, embeddings='given')", data=lambda n: rows, max_steps=1)
    assert before["eval_kernel/margins"] == pytest.approx(2)
    assert before["eval_loss"] == pytest.approx(math.log1p(math.exp(-2)), rel=1e-5)


@pytest.mark.parametrize("embeddings", ["hidden", "given"])
def test_a_resumed_mixture_goes_on_with_its_weights(tmp_path, embeddings):
    loss = LOSSES[-1].format(f", embeddings={embeddings!r}")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "loss_learning_rate": 0.05}
    whole, _, _ = run(tmp_path, loss, **options)
    folder = tmp_path / "run" / "checkpoint-3"
    saved = load_file(folder / "objective.safetensors")
    assert set(saved) == {"groups", "local", "broad"}
    resumed, _, _ = run(tmp_path, loss, resume=str(folder), **options)
    assert all(map(torch.equal, resumed.objective.parameters(), whole.objective.parameters()))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    moved = [float((saved[name] - value.detach()).abs().max()) for name, value in whole.objective.named_parameters()]
    assert max(moved) > 0.01
    assert steps(whole, "weights/rbf")[3:] == steps(resumed, "weights/rbf")[-3:]


@of_each
def test_accumulated_micro_batches_and_a_token_budget_learn_what_the_whole_batch_does(tmp_path, loss):
    """A budget keeps the batch whole for what spans it; accumulated batches have variances of their own."""
    loss, options = loss.format(""), {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    whole, _, _ = run(tmp_path / "a", loss, **options)
    others = [{"token_budget": 60}]
    if not whole.objective.batchwise:
        others.append({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    for number, more in enumerate(others):
        other, _, _ = run(tmp_path / f"b{number}", loss, **options | more)
        for mine, reference in zip(other.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        assert steps(other, "kernel/margins") == pytest.approx(steps(whole, "kernel/margins"), rel=1e-3, abs=1e-5)
