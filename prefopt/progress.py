"""How a run shows itself: a progress bar with the numbers that matter on a terminal, one line per log in a file.

A transformers callback; imports rich and transformers alone.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_SHOWN = (
    ("loss", "loss", ".3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("rewards/margins", "margin", "+.2f"),
    ("ratios/chosen", "chosen ratio", "+.1f"),
    ("ratios/rejected", "rejected ratio", "+.1f"),
    ("learning_rate", "lr", ".1e"),
)


class RunProgress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss, accuracy, margin and log-ratios of the training batches, and what an evaluation found."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.monotonic()
        if not state.is_world_process_zero:
            return
        self._console.print(f"Training for {state.max_steps} steps")
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            line = _line({k.removeprefix("eval_"): v for k, v in logs.items()})
            self._console.print(f"held-out {line}", soft_wrap=True)
        elif "loss" in logs:
            line = _line(logs)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, numbers=line)
            # The bar shows the latest numbers; their history stays on the screen above it.
            step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            seconds = int(time.monotonic() - self._started)
            self._console.print(f"step {step} {seconds // 60:>3}:{seconds % 60:02} {line}", soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def _line(logs: dict[str, Any]) -> str:
    return "  ".join(f"{label} {logs[key]:{form}}" for key, label, form in _SHOWN if key in logs)
