"""Reports the objective, term by term, to experiment trackers.

transformers' callbacks for TensorBoard, Weights & Biases and trackio store the training arguments with a run. A loss
passed as an object is not among them, and a loss written as text is one opaque string there.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from prefopt.losses import Loss
from prefopt.report.versions import version_of


def objective_settings(objective: Loss) -> dict[str, Any]:
    """The loss as flat settings to filter and group runs by: `objective`, `objective/dpo/beta`, ..."""
    settings: dict[str, Any] = {"objective": str(objective), "prefopt_version": version_of("prefopt")}
    for weight, label, term in objective.terms():
        settings[f"objective/{label}/weight"] = weight
        for name, value in term.hyperparameters().items():
            plain = isinstance(value, (bool, int, float, str)) or value is None
            settings[f"objective/{label}/{name}"] = value if plain else str(value)
    return settings


def track(objective: Loss, callbacks: Iterable[Any], output_dir: str) -> TrainerCallback | None:
    """Have every tracker among a trainer's callbacks store the objective with its run.

    Returns:
        A callback to add, if TensorBoard is in use.
    """
    settings = objective_settings(objective)
    written = None
    for callback in callbacks:
        if isinstance(callback, WandbCallback):
            _after_setup(callback, "wandb", settings)
        elif isinstance(callback, TrackioCallback):
            _after_setup(callback, "trackio", settings)
        elif isinstance(callback, TensorBoardCallback):
            if callback.logging_dir is None and callback.tb_writer is None:
                # An evaluation before training would otherwise open a log in the current folder.
                callback.logging_dir = str(Path(output_dir) / "runs" / time.strftime("%Y%m%d-%H%M%S"))
            written = _TensorBoardText(callback, settings)
    return written


def _after_setup(callback: Any, module: str, settings: dict[str, Any]) -> None:
    """Wraps `setup`, in which these callbacks open a run and store the arguments."""
    set_up = callback.setup

    def set_up_and_tell(args: Any, state: Any, model: Any, **keywords: Any) -> None:
        set_up(args, state, model, **keywords)
        if state.is_world_process_zero:
            importlib.import_module(module).config.update(settings, allow_val_change=True)

    callback.setup = set_up_and_tell


class _TensorBoardText(TrainerCallback):
    """Writes the objective once as a text beside the curves."""

    def __init__(self, callback: TensorBoardCallback, settings: dict[str, Any]):
        self._callback = callback
        self._text = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self._written = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._write()

    def on_log(self, *_: Any, **__: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self._callback.tb_writer is not None and not self._written:
            self._callback.tb_writer.add_text("objective", self._text)
            self._written = True
