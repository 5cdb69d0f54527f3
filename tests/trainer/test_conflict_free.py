"""`conflict_free` through the trainer: the gradient it steps with, accumulated, with adapters, in parts, logged.

With momentum too, which `tests/reliability` kills and resumes and `test_own_gradients_processes` runs twice over.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from prefopt.losses import parse
from prefopt.losses.conflict import coefficients, combined, gram_of
from tests.trainer.runs import make_pairs, make_trainer, train

TERMS = ("dpo(beta=0.5)", "0.3*sft(nll='mean')")
SUM = " + ".join(TERMS)


class Look(TrainerCallback):
    """Keeps what the optimizer is about to step with."""

    def __init__(self):
        self.gradients: list[torch.Tensor | None] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def stepped_with(folder, loss: str, *, kind: str = "full", **options) -> list[torch.Tensor | None]:
    """The gradient of the last step, by default the first, of a run on eight pairs, as it reaches the optimizer."""
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    look = Look()
    settings = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "step0_check": "off",
        "per_device_train_batch_size": 8,
        **options,
    }
    trainer = make_trainer(
        folder,
        loss=loss,
        train_dataset=make_pairs(8),
        trainer_options={"peft_config": adapter if kind == "lora" else None},
        **settings,
    )
    # After the trainer's own, of which one puts the gradient there with momentum.
    trainer.add_callback(look)
    trainer.train()
    return look.gradients


def by_hand(folder, method: str, **options) -> list[torch.Tensor | None]:
    """From a run per term."""
    gradients = [stepped_with(folder, term, **options) for term in TERMS]
    return combined(gradients, coefficients(gram_of(gradients), method))


def assert_close(found, expected):
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", ["config", "pcgrad", "balance"])
def test_terms_are_combined_as_their_own_gradients_say(tmp_path, kind, method):
    found = stepped_with(tmp_path, f"conflict_free({SUM}, method={method!r})", kind=kind)
    assert_close(found, by_hand(tmp_path, method, kind=kind))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"token_budget": 60},
        {"token_budget": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"layout": "padded"},
    ],
    ids=str,
)
def test_however_a_batch_is_cut_up(tmp_path, options):
    whole = stepped_with(tmp_path, f"conflict_free({SUM})")
    assert_close(stepped_with(tmp_path, f"conflict_free({SUM})", **options), whole)


def test_terms_whose_examples_act_on_one_another_within_a_budget(tmp_path):
    loss = "conflict_free(dpo(beta=0.5) + sft(nll='token'))"
    assert_close(stepped_with(tmp_path, loss, token_budget=60), stepped_with(tmp_path, loss))


def test_angles_are_logged_and_the_loss_is_the_sum(tmp_path):
    (free, *_), (plain, *_) = (train(tmp_path, loss=loss, max_steps=2) for loss in (f"conflict_free({SUM})", SUM))
    assert -1 <= free["conflict/dpo,sft"] <= 1
    assert free["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for name in ("dpo/loss", "sft/loss", "rewards/margins"):
        assert free[name] == pytest.approx(plain[name], rel=1e-6), name


def test_the_gradient_norm_that_is_logged_is_the_combined_ones(tmp_path):
    found = stepped_with(tmp_path, f"conflict_free({SUM})")
    norm = torch.stack([gradient.norm() for gradient in found if gradient is not None]).norm()
    (entry,) = train(
        tmp_path, loss=f"conflict_free({SUM})", max_steps=1, max_grad_norm=1e6, step0_check="off",
        per_device_train_batch_size=8, train_dataset=make_pairs(8),
    )  # fmt: skip
    assert entry["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_it_learns_both(tmp_path):
    first, *_, last = train(
        tmp_path, loss=f"conflict_free({SUM})", max_steps=20, learning_rate=3e-3, per_device_train_batch_size=8,
        train_dataset=make_pairs(8),
    )  # fmt: skip
    assert last["dpo/loss"] < first["dpo/loss"]
    assert last["sft/loss"] < first["sft/loss"]


def test_what_it_cannot_go_with_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, loss=SUM)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="conflict_free does not go with DeepSpeed, which adds gradients up"):
        trainer._check_conflict_free(parse(f"conflict_free({SUM})"))


# ---- one term a step ------------------------------------------------------------------------------------------------

IN_TURN = f"conflict_free({SUM}, momentum=0.9)"


def run(folder, *, resume=None, **options):
    trainer = make_trainer(
        folder, loss=options.pop("loss", IN_TURN), train_dataset=make_pairs(16),
        trainer_options=options.pop("trainer_options", {}), **{"max_steps": 6, "adam_beta1": 0.9, **options},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "lora"},
        {"optim": "sgd"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"token_budget": 60},
        {"token_budget": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_first_combination_is_that_of_the_terms_own_gradients(tmp_path, options):
    # Nothing moves in the first step, so the second term's gradient is of the same weights and the same pairs.
    found = stepped_with(tmp_path, IN_TURN, max_steps=2, **options)
    assert_close(found, by_hand(tmp_path, "config", **options))


def test_no_step_is_taken_before_every_term_was(tmp_path):
    before, after = run(tmp_path, max_steps=1), run(tmp_path, max_steps=2)
    fresh = weights(make_trainer(tmp_path, loss=IN_TURN))
    assert torch.equal(weights(before), fresh)
    assert not before.optimizer.state_dict()["state"]
    assert not torch.equal(weights(after), fresh)


def test_each_terms_gradient_is_clipped_and_what_adam_is_given_is_not(tmp_path):
    limit = 0.01
    gradients = []
    for term in TERMS:
        whole = stepped_with(tmp_path, term)
        norm = torch.stack([gradient.norm() for gradient in whole if gradient is not None]).norm()
        assert norm > limit
        gradients.append([None if gradient is None else gradient * (limit / norm) for gradient in whole])
    found = stepped_with(tmp_path, IN_TURN, max_steps=2, max_grad_norm=limit)
    assert_close(found, combined(gradients, coefficients(gram_of(gradients), "config")))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_micro_batches_of_a_step_are_of_one_term(tmp_path, optim):
    options = {"optim": optim, "learning_rate": 0.1 if optim == "sgd" else 1e-3, "max_grad_norm": 0.0}
    whole = run(tmp_path, per_device_train_batch_size=8, **options)
    parts = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    start = weights(make_trainer(tmp_path, loss=IN_TURN))
    moved = weights(whole) - start
    assert float(moved.norm()) > 1e-2
    # Adam magnifies rounding where a gradient is next to nothing.
    assert float((weights(parts) - start - moved).norm()) < 1e-2 * float(moved.norm())


def test_with_momentum_the_loss_is_the_sum_and_the_angle_that_of_the_moments(tmp_path):
    first, second, *_ = [entry for entry in run(tmp_path).state.log_history if "loss" in entry]
    plain, alone = (run(tmp_path, loss=loss, max_steps=1).state.log_history[0] for loss in (SUM, TERMS[0]))
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert first["sft/loss"] == pytest.approx(plain["sft/loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert "conflict/dpo,sft" not in first
    assert -1 <= second["conflict/dpo,sft"] <= 1
    assert second["loss"] == pytest.approx(second["dpo/loss"] + 0.3 * second["sft/loss"], rel=1e-5)


def test_evaluation_with_momentum_is_of_the_sum_and_takes_no_turn(tmp_path):
    found = []
    for loss in (IN_TURN, SUM):
        trainer = make_trainer(tmp_path, loss=loss, trainer_options={"eval_dataset": make_pairs(8, 1)})
        found.append(trainer.evaluate()["eval_loss"])
        if loss is IN_TURN:
            assert trainer._moment_step.moments.taken == 0
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_run_with_momentum_goes_on_where_it_stopped(tmp_path):
    # Saved after an odd number of steps: the other term is next.
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path, **options)
    folder = tmp_path / "run" / "checkpoint-3"
    saved = load_file(folder / "objective_moments.safetensors")
    names = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    assert set(saved) == {"taken", "factors", *(f"{term}.{name}" for term in range(2) for name in names)}
    assert int(saved["taken"]) == 3
    size = (folder / "objective_moments.safetensors").stat().st_size
    assert whole._moment_step.bytes < size < 1.1 * whole._moment_step.bytes
    resumed = run(tmp_path, resume=str(folder), **options)
    assert torch.equal(weights(resumed), weights(whole))
    (folder / "complete.json").unlink()
    (folder / "prefopt.json").unlink()
    (folder / "objective_moments.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"objective_moments\.safetensors does not exist"):
        run(tmp_path, resume=str(folder), **options)


def test_a_second_run_of_a_trainer_starts_with_no_moments(tmp_path):
    trainer = run(tmp_path)
    after_one = weights(trainer)
    trainer.train()
    assert trainer._moment_step.moments.taken == 6
    assert not torch.equal(weights(trainer), after_one)


def test_it_learns_both_one_at_a_time(tmp_path):
    first, *_, last = train(
        tmp_path, loss=IN_TURN, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=8,
        train_dataset=make_pairs(8),
    )  # fmt: skip
    assert last["dpo/loss"] < first["dpo/loss"]
    assert last["sft/loss"] < first["sft/loss"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"adam_beta1": 0.8},
            r"conflict_free\(momentum=0.9\) averages each term's gradient as Adam would, but AdamW has beta1=0.8: set "
            "momentum=0.8, or adam_beta1=0.9",
        ),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, "averages gradients itself, but SGD has momentum=0.5"),
        ({"optim": "adafactor"}, "goes with Adam or AdamW .* and plain SGD .* not with Adafactor"),
    ],
)
def test_an_optimizer_that_would_not_follow_the_moments_is_refused(tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        run(tmp_path, **options)
