"""Folders that cannot be written to, disks that are too small, and disks that fill up while something is saved."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from peft import LoraConfig

from prefopt import PreferenceConfig
from prefopt.recipe import main
from prefopt.trainer.saving import checkpoints, disk
from prefopt.trainer.saving.checkpoints import CheckpointError
from tests.reliability.faults import forked
from tests.tiny import make_model
from tests.trainer.runs import make_pairs, make_trainer, save_model, settings

ROOT = Path(__file__).parents[2]
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "loss": "dpo"}
Usage = namedtuple("Usage", "total used free")


def make(tmp_path: Path, **options):
    return make_trainer(tmp_path, **{"train_dataset": make_pairs(16), **SAVED, **options})


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


# ---- before training ---------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_refused_before_data_and_model_are_loaded(tmp_path):
    out = below_a_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"output folder .*/file/out cannot be written to \(Not a directory\)"):
        main("dpo", ["--output_dir", str(out), "--dataset_name", "nowhere.jsonl", "--model_name_or_path", "nowhere"])


def test_a_trainer_refuses_it_before_the_first_step(tmp_path):
    trainer = make(tmp_path)
    trainer.args.output_dir = str(below_a_file(tmp_path))
    with pytest.raises(CheckpointError, match="use another output_dir, or make it writable"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    disk.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_the_size_of_a_checkpoint_is_known_ahead(tmp_path, adapter):
    options = {"peft_config": LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")} if adapter else {}
    trainer = make(tmp_path, trainer_options=options)
    size, known = disk.checkpoint_bytes(trainer.model, trainer.args, sharded=False)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-4"
    names = ("adapter_model.safetensors" if adapter else "model.safetensors", "optimizer.pt")
    assert known
    # File formats and the small files add a few kilobytes.
    assert size == pytest.approx(sum((folder / name).stat().st_size for name in names), rel=0.1)


def test_what_is_guessed_is_said_to_be(tmp_path):
    model = make_model()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    args = PreferenceConfig(**settings(tmp_path, optim="adafactor"))
    assert disk.checkpoint_bytes(model, args, sharded=False) == (2 * weights, False)
    args = PreferenceConfig(**settings(tmp_path, save_only_model=True))
    assert disk.checkpoint_bytes(model, args, sharded=False) == (weights, True)
    args = PreferenceConfig(**settings(tmp_path))
    assert disk.checkpoint_bytes(model, args, sharded=False) == (3 * weights, True)
    assert disk.checkpoint_bytes(model, args, sharded=True) == (4 * weights, False)


@pytest.mark.parametrize(
    ("options", "count"), [({"save_total_limit": 3}, 4), ({}, 5), ({"max_steps": -1}, 0), ({"save_steps": 0.5}, 2)]
)
def test_how_many_there_will_be(tmp_path, options, count):
    fixed = {"max_steps": 10, "save_steps": 2, "save_strategy": "steps", **options}
    assert disk.planned(PreferenceConfig(**settings(tmp_path, **fixed))) == count


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path)
    size, _ = disk.checkpoint_bytes(trainer.model, trainer.args, sharded=False)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(size * 9, size * 9, size - 1))
    with pytest.raises(CheckpointError, match=r"a checkpoint of this run takes about .* GB left: make room"):
        trainer.train()
    assert trainer.state.global_step == 0
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(size * 9, size * 9, 2 * size - 1))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "up to 2 more will be kept" in caplog.text
    trainer = make(tmp_path / "guessed", optim="adafactor")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(size * 9, size * 9, 1))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4


# ---- while it saves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_write_that_fails_midway_leaves_the_checkpoint_before(tmp_path, name):
    make(tmp_path).train()
    run = tmp_path / "run"
    size = (run / "checkpoint-2" / name).stat().st_size
    shutil.rmtree(run / "checkpoint-4")
    output = tmp_path / "output.txt"

    def limited() -> None:
        trainer = make(tmp_path)
        # No file may grow beyond it; writing on fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 if name == "optimizer.pt" else 10_000,) * 2)
        with pytest.raises(CheckpointError) as failed:
            trainer.train(resume_from_checkpoint="auto")
        os.write(2, str(failed.value).encode())
        assert trainer.state.global_step == 4

    assert forked(limited, output=output) == 0, output.read_text()
    said = output.read_text()
    assert f"{run}/checkpoint-4 could not be written" in said
    assert "File too large" in said or "inline_container" in said
    assert f"{run}/checkpoint-2 is untouched. The run stops here" in said
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    assert checkpoints.problem(run / "checkpoint-2") == ""


def test_a_model_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    trainer = make(tmp_path)
    trainer.save_model()
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    output = tmp_path / "output.txt"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(CheckpointError, match=r"the model could not be saved to .*/run"):
            trainer.save_model()

    assert forked(limited, output=output) == 0, output.read_text()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    assert not (tmp_path / "run" / ".unfinished-model").exists()


def test_an_error_of_the_run_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    trainer = make(tmp_path)

    def fails(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", fails)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.train()
    assert checkpoints.choose("auto", tmp_path / "run") == (None, [
        f"{tmp_path}/run/checkpoint-2 is skipped: it is incomplete: complete.json, which is written last, is "
        "missing"
    ])  # fmt: skip


# ---- with mounts of its own ----------------------------------------------------------------------------------------

MOUNTED = """
import sys
from pathlib import Path
from tests.reliability.test_disk import make
try:
    make(Path(sys.argv[1]), max_steps=20).train()
except Exception as error:
    print(type(error).__name__, error)
"""


def in_a_mount(tmp_path: Path, mount: str) -> str:
    """Train in a mount namespace of its own whose `run` folder is mounted as said; what was printed."""
    (tmp_path / "run").mkdir(exist_ok=True)
    save_model(tmp_path)
    script = f"mount {mount} && {sys.executable} -c '{MOUNTED}' {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()[:100]}")
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_was_complete(tmp_path):
    said = in_a_mount(tmp_path, f"-t tmpfs -o size=2m tmpfs {tmp_path}/run")
    assert "CheckpointError" in said
    assert "could not be written" in said
    assert "No space left on device" in said or "inline_container" in said
    assert "is untouched. The run stops here" in said
    assert "more will be kept" in said


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_training(tmp_path):
    run = tmp_path / "run"
    said = in_a_mount(tmp_path, f"--bind {run} {run} && mount -o remount,ro,bind {run}")
    assert f"CheckpointError the output folder {run} cannot be written to (Read-only file system)" in said
