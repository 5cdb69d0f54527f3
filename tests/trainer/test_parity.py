"""The same run under `trl.DPOTrainer` and under ours: loss and gradient norm of ten steps, to 1e-4 relative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.tiny import make_model
from tests.trainer.runs import make_pairs, save_model, train

LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trained_adapter(folder: Path) -> str:
    """A saved adapter that is not zero, so that its frozen copy is a reference of its own."""
    path = folder / "adapter"
    if not path.exists():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(save_model(folder)), lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(path)
    return str(path)


def full(folder: Path) -> dict[str, Any]:
    return {}


def new_adapter(folder: Path) -> dict[str, Any]:
    return {"trainer_options": {"peft_config": lora()}}


def given_reference(folder: Path) -> dict[str, Any]:
    return {"trainer_options": {"ref_model": make_model(seed=1)}}


def continued_adapter(folder: Path) -> dict[str, Any]:
    base = AutoModelForCausalLM.from_pretrained(save_model(folder))
    return {"model": PeftModel.from_pretrained(base, trained_adapter(folder), is_trainable=True)}


def accumulated(folder: Path) -> dict[str, Any]:
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def precomputed(folder: Path) -> dict[str, Any]:
    return {"precompute_ref_log_probs": True}


def checkpointed(folder: Path) -> dict[str, Any]:
    return {"gradient_checkpointing": True}


def cut_short(folder: Path) -> dict[str, Any]:
    return {"max_length": 40}


SETUPS = [full, new_adapter, given_reference, continued_adapter, accumulated, precomputed, checkpointed, cut_short]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.__name__)
@pytest.mark.parametrize("loss", LOSSES)
def test_same_losses_and_gradients_as_trl(tmp_path, loss, setup):
    torch_seeded = {"seed": 3, "beta": 0.1}
    theirs = train(
        tmp_path, trainer=DPOTrainer, config=DPOConfig, loss_type=LOSSES[loss], **torch_seeded, **setup(tmp_path)
    )
    ours = train(tmp_path, loss=f"{loss}(beta=0.1)", seed=3, **setup(tmp_path))
    assert len(ours) == len(theirs) == 10
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert ours[-1]["loss"] != ours[0]["loss"]


@pytest.mark.parametrize("architecture", ["qwen2", "moe", "gpt2"])
def test_same_losses_and_gradients_on_other_architectures(tmp_path, architecture):
    path = save_model(tmp_path, architecture)
    theirs = train(tmp_path, trainer=DPOTrainer, config=DPOConfig, model=path, max_steps=3)
    ours = train(tmp_path, model=path, max_steps=3)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_logged_metrics_equal_trls(tmp_path):
    theirs = train(tmp_path, trainer=DPOTrainer, config=DPOConfig, max_steps=3)
    ours = train(tmp_path, max_steps=3)
    names = [f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected", "entropy", "num_tokens", "mean_token_accuracy"]
    for mine, reference in zip(ours, theirs, strict=True):
        assert {n: mine[n] for n in names} == pytest.approx({n: reference[n] for n in names}, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo", "beta": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "apo_zero"},
        {"use_weighting": True},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_trl_options_mean_what_they_mean_in_trl(tmp_path, options):
    theirs = train(tmp_path, trainer=DPOTrainer, config=DPOConfig, max_steps=3, **options)
    ours = train(tmp_path, max_steps=3, **options)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_label_smoothing_is_honoured(tmp_path):
    plain, smoothed = train(tmp_path, max_steps=3), train(tmp_path, max_steps=3, label_smoothing=0.3)
    assert smoothed[0]["grad_norm"] < 0.5 * plain[0]["grad_norm"]
    written_out = train(tmp_path, max_steps=3, loss="dpo(beta=0.1, label_smoothing=0.3)")
    assert [e["loss"] for e in written_out] == [e["loss"] for e in smoothed]


def test_two_runs_of_one_seed_are_equal(tmp_path):
    first, second = (train(tmp_path, max_steps=4, **new_adapter(tmp_path)) for _ in range(2))
    assert [(e["loss"], e["grad_norm"]) for e in first] == [(e["loss"], e["grad_norm"]) for e in second]
    assert len(make_pairs()) == 40
