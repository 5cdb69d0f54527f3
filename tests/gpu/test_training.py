"""Ways to train, each for a few steps on the device: what must not change the numbers does not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tests.gpu.steps import pairs, relative, run


def adapter() -> LoraConfig:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def options(way: str) -> dict:
    return {"trainer_options": {"peft_config": adapter()}} if way == "lora" else {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_weights_move_and_numbers_stay_finite(tmp_path, small_model, device, note, way, dtype):
    made = run(
        tmp_path, small_model, device, steps=4, bf16=True, model_init_kwargs={"dtype": dtype}, learning_rate=1e-3,
        **options(way),
    )  # fmt: skip
    note("losses", made.losses)
    assert len(made.losses) == 4
    assert all(0 < loss < 10 for loss in made.losses)
    assert made.losses[0] == pytest.approx(0.6931, abs=0.02)
    assert float(made.gradient.norm()) > 0
    trained = [p for p in made.trainer.model.parameters() if p.requires_grad]
    assert all(p.device.type == device and bool(p.isfinite().all()) for p in trained)


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("change", ["gradient_checkpointing", "token_budget"])
def test_what_saves_memory_changes_no_number(tmp_path, small_model, device, note, change, way):
    value = {"gradient_checkpointing": True, "token_budget": 400}[change]
    plain = run(tmp_path / "plain", small_model, device, **options(way))
    saving = run(tmp_path / "saving", small_model, device, **{change: value}, **options(way))
    note("gradient", relative(saving.gradient, plain.gradient))
    assert change != "token_budget" or saving.calls > plain.calls == 1
    assert relative(saving.gradient, plain.gradient) < 1e-4
    assert saving.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_kept_reference_is_the_one_that_is_computed(tmp_path, small_model, device):
    cache = str(tmp_path / "cache")
    data = pairs(8)
    runs = [
        run(tmp_path / name, small_model, device, steps=4, bf16=True, train_dataset=data, reference_cache=where)
        for name, where in (("without", "off"), ("first", cache), ("second", cache))
    ]
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
    for other in runs[1:]:
        assert other.losses == pytest.approx(runs[0].losses, rel=0.02)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_resumed_run_is_the_one_that_went_through(tmp_path, small_model, device, note, way):
    common = {"steps": 4, "bf16": True, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = run(tmp_path / "whole", small_model, device, **common, **options(way))
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-2")
    resumed = run(tmp_path / "resumed", small_model, device, resume=checkpoint, **common, **options(way))

    def weights(trainer) -> torch.Tensor:
        return torch.cat([p.detach().float().flatten().cpu() for p in trainer.model.parameters() if p.requires_grad])

    gap = relative(weights(resumed.trainer), weights(whole.trainer))
    note("weights", gap)
    # Kernels of a GPU add up in any order, and Adam makes whole steps of gradients that are rounding alone.
    near = 1e-4 if device == "cpu" else 0.01
    assert resumed.losses == pytest.approx(whole.losses, rel=near)
    assert gap < near
