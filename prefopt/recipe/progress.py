"""Progress of a run: a progress bar with the main numbers on a terminal, one line per log in a file.

A transformers callback; imports only rich, transformers and `prefopt.trainer.metrics`.
"""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from prefopt.trainer.metrics import still_reference

_SHOWN = (
    ("loss", "loss", ".3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("rewards/margins", "margin", "+.2f"),
    ("ratios/chosen", "chosen ratio", "+.1f"),
    ("ratios/rejected", "rejected ratio", "+.1f"),
    ("learning_rate", "lr", ".1e"),
)
_GAP = "  "


class _AsManyAsFit:
    """Numbers side by side; the last ones are left out if the line is too short."""

    def __init__(self, numbers: list[str]):
        self._numbers = numbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = list(self._numbers)
        while shown and len(_GAP.join(shown)) > options.max_width:
            shown.pop()
        yield Text(_GAP.join(shown), no_wrap=True)


class _Numbers(ProgressColumn):
    """The latest numbers, as many as fit beside the bar: the line above has them all."""

    def render(self, task: Task) -> _AsManyAsFit:
        return _AsManyAsFit(task.fields["numbers"])


class RunProgress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss, accuracy, margin and log-ratios of the training batches, and results of evaluations."""

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
            TextColumn("step", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            _Numbers(table_column=Column(ratio=1)),
            console=self._console,
            expand=True,
            # The time left is estimated from the last thousand steps, however long they take.
            speed_estimate_period=math.inf,
        )
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers=[])
        self._bar.start()

    def close(self) -> None:
        """Remove the bar if a run ends early."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            held_out = {name.removeprefix("eval_"): value for name, value in logs.items()}
            self._print("held-out", _numbers(held_out, untrained=state.global_step == 0))
        elif "loss" in logs:
            # The metrics of the first step were computed before its update.
            numbers = _numbers(logs, untrained=state.global_step <= 1)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, numbers=numbers)
            # The bar shows the latest numbers; their history stays on the screen above it.
            step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            seconds = int(time.monotonic() - self._started)
            self._print(f"step {step} {seconds // 60:>3}:{seconds % 60:02}", numbers)

    def _print(self, head: str, numbers: list[str]) -> None:
        """One line in a file; on a terminal as many as its width asks for, each number whole."""
        width = self._console.width if self._console.is_terminal else math.inf
        lines = [head]
        for place, number in enumerate(numbers):
            longer = f"{lines[-1]}{_GAP if place else ' '}{number}"
            if len(longer) <= width or not place:
                lines[-1] = longer
            else:
                lines.append(f"{' ' * len(head)} {number}")
        self._console.print("\n".join(lines), soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def _numbers(logs: dict[str, Any], untrained: bool) -> list[str]:
    shown = {key: f"{label} {logs[key]:{form}}" for key, label, form in _SHOWN if key in logs}
    if untrained and "rewards/accuracies" in shown and still_reference(logs):
        shown["rewards/accuracies"] = "accuracy n/a (policy = reference)"
    return list(shown.values())
