"""`conflict_free` through the trainer: the gradient it steps with, accumulated, with adapters, in parts, logged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from prefopt.losses import parse
from prefopt.losses.conflict import coefficients, combined, gram_of
from prefopt.trainer.term_gradients import check_engine
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
    with pytest.raises(ValueError, match="conflict_free does not work with DeepSpeed, which adds gradients up"):
        check_engine(trainer, parse(f"conflict_free({SUM})"))
