"""Which checkpoint folders count, which one a run goes on from, which are deleted, and what resuming refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from prefopt.trainer.saving import checkpoints
from prefopt.trainer.saving.checkpoints import CheckpointError
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer, save_model, settings

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "loss": "dpo"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run's output folder, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    make_trainer(folder, train_dataset=make_pairs(16), **SAVED).train()
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def make(tmp_path: Path, **options):
    return make_trainer(tmp_path, **{"train_dataset": make_pairs(16), **SAVED, **options})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---- what counts -------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_has_no_problem_and_lists_every_file(made):
    folder = made / "checkpoint-4"
    assert checkpoints.problem(folder) == ""
    listed = json.loads((folder / "complete.json").read_text())["files"]
    assert set(listed) == {path.name for path in folder.iterdir()} - {"complete.json"}
    assert listed["model.safetensors"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "prefopt.json"]
)
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_file_is_named_and_auto_falls_back(run, name, harm):
    path = run / "checkpoint-4" / name
    cut(path) if harm == "cut" else path.unlink()
    assert name in checkpoints.problem(run / "checkpoint-4")
    with pytest.raises(CheckpointError, match=f"cannot resume from .*checkpoint-4: {name}"):
        checkpoints.choose(str(run / "checkpoint-4"), run)
    for asked in ("auto", "AUTO", True, "true"):
        chosen, passed = checkpoints.choose(asked, run)
        assert chosen == run / "checkpoint-2"
        assert len(passed) == 1
        assert name in passed[0]


def test_a_file_of_the_right_size_with_another_content_is_found_out(run):
    for name in ("model.safetensors", "optimizer.pt"):
        path = run / "checkpoint-4" / name
        kept = path.read_bytes()
        path.write_bytes(b"\0" * len(kept))
        assert f"{name} is damaged" in checkpoints.problem(run / "checkpoint-4")
        path.write_bytes(kept)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"files": 3}'])
def test_an_unreadable_manifest_is_as_good_as_none(run, text):
    (run / "checkpoint-4" / "complete.json").write_text(text)
    assert "complete.json cannot be read" in checkpoints.problem(run / "checkpoint-4")
    assert checkpoints.choose("auto", run)[0] == run / "checkpoint-2"


def test_without_its_manifest_it_was_not_finished(run):
    (run / "checkpoint-4" / "complete.json").unlink()
    assert "it is incomplete" in checkpoints.problem(run / "checkpoint-4")
    assert checkpoints.remove_unfinished(run) == [run / "checkpoint-4"]
    assert not (run / "checkpoint-4").exists()
    assert (run / "checkpoint-2").exists()


def test_nothing_to_resume_from(tmp_path, made):
    for folder in (tmp_path, tmp_path / "none"):
        assert checkpoints.choose("auto", folder) == (None, [])
        with pytest.raises(CheckpointError, match="holds no checkpoint to resume from"):
            checkpoints.choose("true", folder)
    for asked in (None, False, "false", "none", ""):
        assert checkpoints.choose(asked, made) == (None, [])
    with pytest.raises(CheckpointError, match="there is no such folder"):
        checkpoints.choose("checkpont-4", made)


def test_checkpoints_of_plain_trl_count_if_they_can_be_read(tmp_path):
    model = save_model(tmp_path)
    arguments = settings(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    DPOTrainer(
        model=model, args=DPOConfig(**arguments), train_dataset=make_pairs(16), processing_class=make_tokenizer()
    ).train()
    run = tmp_path / "run"
    assert checkpoints.choose("auto", run) == (run / "checkpoint-2", [])
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 4
    for step in (3, 4):  # transformers goes on with the checkpoint's save_steps
        assert (run / f"checkpoint-{step}" / "complete.json").exists()
        shutil.rmtree(run / f"checkpoint-{step}")
    cut(run / "checkpoint-2" / "optimizer.pt")
    (run / "checkpoint-1" / "trainer_state.json").unlink()
    chosen, passed = checkpoints.choose("auto", run)
    assert chosen is None
    listed = " ".join(passed)
    assert "checkpoint-2 is skipped: optimizer.pt is damaged" in listed
    assert "checkpoint-1 is skipped: trainer_state.json is missing" in listed


def test_weights_without_an_optimizer_cannot_be_continued(tmp_path):
    make(tmp_path, save_only_model=True).train()
    assert "optimizer.pt is missing (save_only_model" in checkpoints.problem(tmp_path / "run" / "checkpoint-4")


def test_pickled_weights_are_passed_over_by_name(run):
    folder = run / "checkpoint-4"
    for name in ("complete.json", "prefopt.json"):
        (folder / name).unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    chosen, passed = checkpoints.choose("auto", run)
    assert chosen == run / "checkpoint-2"
    assert "model.safetensors or adapter_model.safetensors is missing; pytorch_model.bin is pickled" in passed[0]


def test_an_index_names_the_shard_that_is_missing(run):
    folder = run / "checkpoint-4"
    (folder / "complete.json").unlink()
    (folder / "prefopt.json").unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoints.problem(folder) == "model-00002-of-00002.safetensors is missing"


# ---- which are deleted -------------------------------------------------------------------------------------------


def written(folder: Path, step: int, at: int, whole: bool = True) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (path / name).write_bytes(b"")
    (path / "complete.json").write_text(json.dumps({"written": at, "files": {} if whole else {"gone": 1}}))


@pytest.fixture
def unread(monkeypatch):
    """Files that are there are taken for readable ones."""
    monkeypatch.setattr(checkpoints, "_unreadable", lambda folder: "")


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, {10, 20, 30, 5}),
        (2, None, {30, 5}),
        (1, None, {5}),
        (1, 10, {10, 5}),
        (2, 10, {10, 5}),
        (3, 10, {10, 30, 5}),
    ],
)
def test_the_last_written_stay_whatever_their_step(tmp_path, unread, limit, best, left):
    # An earlier run had gone to step 30; the one that has just written 5 must not lose it.
    for at, step in enumerate((10, 20, 30, 5)):
        written(tmp_path, step, at)
    checkpoints.rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert {int(path.name.split("-")[1]) for path in tmp_path.iterdir()} == left
    assert checkpoints.choose("auto", tmp_path)[0] == tmp_path / "checkpoint-5"


def test_damaged_ones_go_first_and_the_newest_whole_one_never(tmp_path, unread):
    for at, (step, whole) in enumerate([(1, True), (2, False), (3, True), (4, False)]):
        written(tmp_path, step, at, whole)
    checkpoints.rotate(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
    checkpoints.rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3"}


def test_a_run_keeps_as_many_as_it_is_told_and_writes_a_step_once(tmp_path, monkeypatch):
    begun = []
    begin = checkpoints.begin
    monkeypatch.setattr(checkpoints, "begin", lambda folder, state: begun.append(folder.name) or begin(folder, state))
    trainer = make(tmp_path, save_steps=1, save_total_limit=2, max_steps=5)
    trainer.train()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert begun == [f"checkpoint-{step}" for step in range(1, 6)]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    saved = torch.load(tmp_path / "run" / "checkpoint-5" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
    assert trainer.args.save_total_limit == 2


def test_the_reference_cache_is_on_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
    trainer = make(tmp_path, reference_cache=str(tmp_path / "cache"), max_steps=2)
    complete, unwritten = checkpoints.complete, []

    def look(folder: Path) -> None:
        unwritten.append(len(trainer._scorer.cache._new))
        complete(folder)

    monkeypatch.setattr(checkpoints, "complete", look)
    trainer.train()
    assert trainer._scorer.cache.misses == 16
    assert unwritten == [0]


# ---- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "ipo"}, r"trained with the loss dpo\(beta=0.1, .*this run has ipo\("),
        ({"train_dataset": make_pairs(20)}, "training rows: 16 then, 20 now"),
        ({"per_device_train_batch_size": 2}, "examples a step: 4 then, 2 now"),
        ({"seed": 7}, "seed: 42 then, 7 now"),
    ],
)
def test_a_run_that_is_another_one_is_refused_with_both_values(tmp_path, run, changed, message):
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, **changed).train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_what_a_person_may_change_is_said_and_done(tmp_path, run, caplog):
    same_batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, max_steps=6, learning_rate=1e-4, **same_batch)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 6
    assert "learning_rate was 0.001 when it was written and is 0.0001 now" in caplog.text
    assert "max_steps was 4 when it was written and is 6 now" in caplog.text
    assert "examples a step" not in caplog.text
    skipping = make(tmp_path / "skipping", train_dataset=make_pairs(20), ignore_data_skip=True)
    with caplog.at_level(logging.WARNING):
        skipping.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "rows was 16 when it was written and is 20 now" in caplog.text


def test_a_new_run_in_an_old_folder_is_told_and_resumed_as_itself(tmp_path, run, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, max_steps=3, save_steps=3).train()
    assert "holds checkpoints of an earlier run (checkpoint-2, checkpoint-4)" in caplog.text
    assert checkpoints.choose("auto", run)[0] == run / "checkpoint-3"


def test_an_adapter_goes_on_too(tmp_path):
    options = {"peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")}
    make(tmp_path, trainer_options=options).train()
    cut(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    trainer = make(tmp_path, trainer_options=options)
    assert trainer.checkpoint_to_resume("auto") == str(tmp_path / "run" / "checkpoint-2")
    trainer.train(resume_from_checkpoint="auto")
    assert checkpoints.problem(tmp_path / "run" / "checkpoint-4") == ""


def adapted(**changed):
    """Options of a run that trains an adapter."""
    adapter = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changed})
    return {"trainer_options": {"peft_config": adapter}}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (adapted(), {}, "checkpoint-4 was written by a run that trained an adapter; this run trains all weights of"),
        (
            {},
            adapted(),
            "checkpoint-4 was written by a run that trained all weights of a model; this run trains an ad",
        ),
        (adapted(), adapted(r=4), r"is of another adapter \(r: 8 then, 4 now\)\. Resume with the model and"),
        (adapted(), adapted(lora_alpha=32), r"is of another adapter \(lora_alpha: 8 then, 32 now\)"),
        (adapted(), adapted(use_dora=True), r"is of another adapter \(use_dora: False then, True now\)"),
        (
            adapted(init_lora_weights="pissa"),
            adapted(),
            r"is of another adapter \(init_lora_weights: pissa then, True now\)",
        ),
        (adapted(), adapted(target_modules=["v_proj"]), r"is of another adapter \(target_modules: .*q_proj.*v_proj"),
        ({}, {"model": "gpt2"}, r"is of another model \(model_type: llama then, gpt2 now"),
    ],
    ids=["adapter to full", "full to adapter", "rank", "scale", "kind", "base", "modules", "architecture"],
)
def test_weights_of_another_kind_are_refused(tmp_path, before, now, message):
    make(tmp_path, **before).train()
    options = {**now, "model": save_model(tmp_path, now["model"])} if "model" in now else now
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, **options).train(resume_from_checkpoint="auto")


def test_the_state_of_another_optimizer_is_refused(run, tmp_path):
    trainer = make(tmp_path, optim="sgd")
    with pytest.raises(CheckpointError, match=r"state of optim='adamw_torch_fused', which 'sgd' cannot go on from"):
        trainer.train(resume_from_checkpoint="auto")
    trainer = make(tmp_path, optim="adamw_torch", max_steps=5)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 5


def test_the_state_of_other_parameters_is_refused(run, tmp_path):
    trainer = make(tmp_path)
    trainer.model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"checkpoint-4: .*does not fit the parameters that are trained now"):
        trainer.train(resume_from_checkpoint="auto")


@pytest.mark.parametrize("modules", ["all-linear", ["v_proj", "q_proj"], r".*\.(q|v)_proj"])
def test_the_same_adapter_however_it_is_written_is_resumed(tmp_path, modules):
    make(tmp_path, **adapted(target_modules=modules, modules_to_save=["lm_head"])).train()
    trainer = make(tmp_path, max_steps=5, **adapted(target_modules=modules, modules_to_save=["lm_head"]))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 5


# ---- the final model ---------------------------------------------------------------------------------------------


def test_a_save_that_breaks_off_leaves_the_weights_of_before(tmp_path, run, monkeypatch):
    trainer = make(tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model()
    kept = (run / "model.safetensors").read_bytes()
    trainer.model.get_input_embeddings().weight.data.add_(1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.save_model()
    assert (run / "model.safetensors").read_bytes() == kept
    trainer.save_model()
    assert not (run / ".unfinished-model").exists()
    assert (run / "model.safetensors").read_bytes() != kept
    weights = load_file(run / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(weights, trainer.model.get_input_embeddings().weight.data, rtol=0, atol=0)


def test_shards_of_an_earlier_save_go(tmp_path):
    trainer = make(tmp_path, max_steps=1, save_strategy="no")
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (run / "model.safetensors.index.json").write_text("{}")
    (run / "notes.txt").write_text("mine")
    trainer.save_model()
    assert not list(run.glob("*of*"))
    assert not (run / "model.safetensors.index.json").exists()
    assert (run / "notes.txt").read_text() == "mine"


def test_times_are_those_of_writing_not_of_looking(run):
    os.utime(run / "checkpoint-2", (time.time() + 60,) * 2)
    assert [found.step for found in checkpoints.find(run)] == [4, 2]
