"""Tells experiment trackers what transformers' own callbacks do not know: the objective, term by term.

The callbacks of TensorBoard, Weights & Biases and trackio file the training arguments with a run. A loss that was
passed as an object is not among them, and one that was written as text is one opaque string there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from prefopt import __version__
from prefopt.losses import Loss


def objective_settings(objective: Loss) -> dict[str, Any]:
    """The loss as flat settings to filter and group runs by: `objective`, `objective/dpo/beta`, ..."""
    settings: dict[str, Any] = {"objective": str(objective), "prefopt_version": __version__}
    for weight, label, term in objective.terms():
        settings[f"objective/{label}/weight"] = weight
        for name, value in term.hyperparameters().items():
            plain = isinstance(value, (bool, int, float, str)) or value is None
            settings[f"objective/{label}/{name}"] = value if plain else str(value)
    return settings


class TrackedObjective(TrainerCallback):
    """Adds the objective to the run of every tracker that is in use.

    Args:
        objective: of the run.
        callbacks: gives the trainer's callbacks, TensorBoard's among them.
    """

    def __init__(self, objective: Loss, callbacks: Callable[[], list[Any]]):
        self._settings = objective_settings(objective)
        self._callbacks = callbacks
        self._told: set[Any] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # An evaluation before training opens the run already.
        self._tell(state)

    def _tell(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if (run := getattr(wandb, "run", None)) is not None and self._is_new(("wandb", run.id)):
            run.config.update(self._settings, allow_val_change=True)
        context = getattr(trackio, "context_vars", None)
        run = None if context is None else context.current_run.get()
        if run is not None and self._is_new(("trackio", id(run))):
            run.config.update(self._settings)
        for callback in self._callbacks():
            writer = getattr(callback, "tb_writer", None) if isinstance(callback, TensorBoardCallback) else None
            if writer is not None and self._is_new(("tensorboard", "")):
                writer.add_text("objective", "\n".join(f"    {k}: {v}" for k, v in self._settings.items()))

    def _is_new(self, run: Any) -> bool:
        fresh = run not in self._told
        self._told.add(run)
        return fresh
