"""Saving a model so that its folder always holds a complete one: old weights stay until the new are on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prefopt.safety.folders import ASIDE, REFERENCE_ADAPTER, earlier_results, is_whole, move_into, recover
from prefopt.trainer.saving.checkpoints import CheckpointError

_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream error")


def save_aside(trainer: Any, folder: Path, write: Callable[[str], None], outdates: bool) -> None:
    """Save a trainer's model beside the one in a folder, then replace that. Every process must call this.

    Args:
        trainer: the trainer, for its model.
        folder: where the model goes.
        write: transformers' own way to save into a folder.
        outdates: whether results in the folder belong to the model that is replaced.

    Raises:
        CheckpointError: if it cannot be written, saying what is in the folder now.
    """
    aside, wait, saves = folder / ASIDE, trainer.accelerator.wait_for_everyone, trainer.args.should_save
    try:
        if saves:
            recover(folder)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if (folder / "README.md").exists():
                # peft adds its own lines to an existing card, and writes an empty one otherwise.
                shutil.copyfile(folder / "README.md", aside / "README.md")
        wait()
        _write(trainer, str(aside), write)
        wait()
        if saves:
            outdated = earlier_results(folder) if outdates else []
            move_into(aside, folder)
            for path in outdated:
                path.unlink(missing_ok=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_of_the_disk(error):
            raise
        raise CheckpointError(_unsaved(folder, error)) from error


def _write(trainer: Any, folder: str, write: Callable[[str], None]) -> None:
    """Write an unsharded model into an empty folder."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    # transformers would write no weights if checkpoints are sharded, which is accelerate's default for FSDP2.
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.args.should_save:
            trainer._save(folder, state_dict=weights)
    write(folder)
    if trainer.args.should_save:
        # TRL's frozen copy of a loaded adapter, the reference, is not part of the result. Checkpoints have it, as
        # resuming loads every adapter.
        shutil.rmtree(Path(folder) / REFERENCE_ADAPTER, ignore_errors=True)


def _unsaved(folder: Path, error: BaseException) -> str:
    """The error for a model that could not be saved; partly written files are deleted."""
    if is_whole(folder / ASIDE):
        return (
            f"the model is complete in {folder / ASIDE}, but could not be put in its place in {folder} ({error}). "
            "Save again, or move its files yourself"
        )
    shutil.rmtree(folder / ASIDE, ignore_errors=True)
    return (
        f"the model could not be saved to {folder} ({error}); earlier weights in it are untouched. "
        "Free disk space, then save again, or run the same command with --resume_from_checkpoint auto"
    )


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error comes from writing a file rather than from the run."""
    if isinstance(error, CheckpointError):
        return False
    # torch.save raises RuntimeError, which is also raised for errors on a device.
    return isinstance(error, (OSError, SafetensorError)) or any(words in str(error) for words in _TORCH_SAVE)
