"""An objective's own state (a running mean, say) saved with every checkpoint and read back when a run resumes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from prefopt.losses import Loss
from prefopt.scoring.cache import ReferenceCache
from prefopt.trainer.learned import LearnedLoss

FILE = "objective.safetensors"
OPTIMIZER_FILE = "objective_optimizer.safetensors"


class ObjectiveState(TrainerCallback):
    """Writes the objective's buffers and parameters into each checkpoint; a stateless objective leaves no file.

    Args:
        objective: of this run.
        learned: what trains its parameters, if it has any.
    """

    def __init__(self, objective: Loss, learned: LearnedLoss | None = None):
        self._objective = objective
        self._learned = learned

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        optimizer = {} if self._learned is None else self._learned.state_dict()
        for file, state_dict in ((FILE, self._objective.state_dict()), (OPTIMIZER_FILE, optimizer)):
            tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
            if tensors:
                unfinished = folder / f"{file}.unfinished"
                save_file(tensors, unfinished)
                os.replace(unfinished, folder / file)


class CacheWriter(TrainerCallback):
    """Writes what a reference cache has gathered with every checkpoint, after evaluations and epochs, and at the end.

    Args:
        cache: of this process.
        wait: returns once every process has called it.
    """

    def __init__(self, cache: ReferenceCache, wait: Callable[[], None]):
        self._cache = cache
        self._wait = wait

    def on_save(self, *_: Any, **__: Any) -> None:
        self._cache.write()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._cache.write()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._cache.write()
        # The next epoch deals the rows out anew: what one process has scored, another will ask for.
        self._wait()
        self._cache.read_new_files()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._cache.write()


def restore(
    objective: Loss, resume_from: str | bool | None, output_dir: str, learned: LearnedLoss | None = None
) -> None:
    """Read an objective's state back from the checkpoint that a run resumes from.

    Raises:
        FileNotFoundError: if the objective has state and the checkpoint holds none.
    """
    folder = get_last_checkpoint(output_dir) if resume_from is True else resume_from
    if not folder or not objective.state_dict():
        return
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{objective} keeps state between steps, but {path} does not exist: the checkpoint was written with "
            "another objective. Start anew, or resume with the objective that it was trained with"
        )
    objective.load_state_dict(load_file(path))
    if learned is not None:
        learned.load_state_dict(load_file(Path(folder) / OPTIMIZER_FILE))
