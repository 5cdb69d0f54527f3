"""A loss or a gradient that is not finite: the run stops, names the rows, and what it had learnt is on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from prefopt.trainer.finite import all_finite, last_good, last_good_checkpoint
from tests.processes import torchrun
from tests.trainer.poison import GRADIENT, LOSS, loss_of, pairs
from tests.trainer.runs import make_trainer, require, save_model

ROW = 3


def trainer_of(
    folder: Path, kind: float, row=ROW, expression: str = "bco", lora: bool = False, rows: int = 32, **more
):
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    options = {"loss": loss_of(expression), "peft_config": adapter, **more.pop("trainer_options", {})}
    data = pairs(kind, row, rows)
    return make_trainer(folder, train_dataset=data, trainer_options=options, max_steps=8, seed=3, **more)


def stopped(trainer) -> tuple[int, str]:
    """The step at which training stops, and what it says."""
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    found = re.search(r"at step (\d+)", message)
    assert found is not None
    return int(found[1]), message


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = [path for path in checkpoint.glob("*.safetensors") if path.name != "objective.safetensors"]
    return load_file(file)


@pytest.mark.parametrize("kind", [LOSS, GRADIENT])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_was_trained_before_is_saved_as_if_the_step_had_not_begun(tmp_path, kind, lora, accumulate):
    options = {"lora": lora, "gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    step, message = stopped(trainer_of(tmp_path / "a", kind, **options))
    assert step > 0
    assert "a poisoned bridge" in message
    checkpoint = tmp_path / "a" / "run" / f"checkpoint-{step}"
    assert f"after step {step}, the last good one, is saved in {checkpoint}" in message
    assert "learning rate" in message
    # The same run without the poison, its checkpoints written as they fall due.
    twin = trainer_of(tmp_path / "b", 0.0, **options, save_strategy="steps", save_steps=1)
    twin.train()
    theirs = tmp_path / "b" / "run" / f"checkpoint-{step}"
    for name, value in weights(theirs).items():
        assert torch.equal(weights(checkpoint)[name], value), name
    ours, whole = (load_file(folder / "objective.safetensors") for folder in (checkpoint, theirs))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)
    # Going on without the poison ends where the twin ended.
    mended = trainer_of(tmp_path / "a", 0.0, **options)
    mended.train(resume_from_checkpoint=str(checkpoint))
    for (name, one), other in zip(mended.model.named_parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone_and_is_named(tmp_path):
    trainer = trainer_of(tmp_path, GRADIENT, lora=True)
    step, message = stopped(trainer)
    assert f"the loss is finite at step {step}, but its gradient of base_model.model" in message
    assert "and 5 more is not. The rows of this step:\n" in message
    assert message.count("chosen: ") == 4
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("kind", [LOSS, GRADIENT])
def test_nothing_is_saved_before_the_first_step(tmp_path, kind):
    trainer = trainer_of(tmp_path, kind, rows=5, row=0, per_device_train_batch_size=5)
    step, message = stopped(trainer)
    assert step == 0
    assert "No step had been completed, so there is nothing to save." in message
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    step, message = stopped(trainer_of(tmp_path, LOSS, save_strategy="steps", save_steps=1))
    assert f"The state before this step is in {tmp_path / 'run' / f'checkpoint-{step}'}." in message


def test_poisoned_weights_are_not_saved_and_the_last_good_checkpoint_is_named(tmp_path):
    trainer = trainer_of(tmp_path, 0.0, None, save_strategy="steps", save_steps=2)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                with torch.no_grad():
                    trainer.model.get_output_embeddings().weight[0, 0] = float("nan")

    trainer.add_callback(Spoil())
    step, message = stopped(trainer)
    assert step == 5
    assert "The weights themselves are NaN or infinite and are not saved." in message
    assert f"The last good checkpoint: {tmp_path / 'run' / 'checkpoint-4'}." in message
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_it_happens_in_an_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": {"eval_dataset": pairs(LOSS, 5, rows=8)}}
    trainer = trainer_of(tmp_path, 0.0, None, **options)
    step, message = stopped(trainer)
    assert step == 2
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert f"is saved in {checkpoint}" in message
    # The objective's state is that of the step that was completed.
    saved = load_file(checkpoint / "objective.safetensors")
    buffers = dict(trainer.objective.named_buffers())
    assert {name: value.item() for name, value in saved.items()} == {name: buffers[name].item() for name in saved}
    assert any(value.item() != 0 for value in saved.values())


def test_an_evaluation_outside_of_training_saves_nothing(tmp_path):
    trainer = trainer_of(tmp_path, 0.0, None, trainer_options={"eval_dataset": pairs(LOSS, 5, rows=8)})
    with pytest.raises(FloatingPointError, match="a poisoned bridge"):
        trainer.evaluate()
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, LOSS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_checkpoint", full)
    _, message = stopped(trainer)
    assert "the loss is nan at step" in message
    assert "could not be saved" in message
    assert "No space left on device" in message


def test_parts_of_a_token_budget_stop_as_one(tmp_path):
    step, message = stopped(trainer_of(tmp_path, LOSS, expression="dpo", token_budget=60))
    assert "a poisoned bridge" in message
    assert (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").exists()


class TestFiniteness:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_one_number_among_many_is_found(self, dtype, bad):
        many = [torch.ones(7, 5, dtype=dtype), torch.full((64, 64), 6e4, dtype=dtype), torch.empty(0, dtype=dtype)]
        assert all_finite(many)
        many[0][3, 3] = bad
        assert not all_finite(many)

    def test_whole_numbers_and_nothing_are_finite(self):
        assert all_finite([torch.ones(3, dtype=torch.int64), None])
        assert all_finite([])

    def test_checkpoints_are_passed_over_where_they_are_broken(self, tmp_path):
        for step, value in ((1, 1.0), (2, 2.0), (10, float("nan")), (11, None)):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "trainer_state.json").write_text("{}")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.save({}, folder / name)
            if value is None:
                (folder / "model.safetensors").write_bytes(b"cut off")
            else:
                save_file({"a": torch.tensor([1.0, value])}, folder / "model.safetensors")
        (tmp_path / "checkpoint-12").mkdir()
        assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
        assert last_good_checkpoint(tmp_path / "none") is None

    def test_weights_that_an_engine_keeps_to_itself_are_not_called_bad(self, tmp_path):
        assert last_good(tmp_path) == "There is no earlier checkpoint with finite weights."
        sharded = tmp_path / "checkpoint-3"
        sharded.mkdir()
        for name, text in (("trainer_state.json", "{}"), ("latest", "global_step3")):
            (sharded / name).write_text(text)
        assert f"{sharded} is complete, but its weights are in the engine's own files" in last_good(tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "kind", "budget"),
    [
        ("ddp", LOSS, None),
        ("ddp", LOSS, 60),
        ("ddp", GRADIENT, None),
        ("zero2", LOSS, None),
        ("zero2", GRADIENT, None),
        ("zero3", LOSS, 60),
    ],
)
def test_two_processes_stop_together(tmp_path, engine, kind, budget):
    """One of them has the row; both end, with the same words, and the checkpoint is whole."""
    require(engine)
    save_model(tmp_path)
    torchrun("tests.trainer.finite_processes", str(tmp_path), engine, str(kind), str(budget))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["world"] == other["world"] == 2
    assert one["wrapped"] == ("DistributedDataParallel" if engine == "ddp" else "DeepSpeedEngine")
    assert one["message"] == other["message"]
    assert one["step"] == other["step"] > 0
    assert "a poisoned bridge" in one["message"]
    checkpoint = tmp_path / "run" / f"checkpoint-{one['step']}"
    assert f"is saved in {checkpoint}" in one["message"]
    assert (checkpoint / "trainer_state.json").exists()
    if engine == "zero3":
        # Weights are gathered into one file only where the engine's configuration asks for it.
        assert len(list((checkpoint / f"global_step{one['step']}").glob("*_model_states.pt"))) == 2
    else:
        assert all(torch.isfinite(value).all() for value in weights(checkpoint).values())
