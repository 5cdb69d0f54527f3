"""Stop signals: the run finishes its step, saves a checkpoint, and ends with the signal's exit status.

Schedulers send SIGTERM before they kill, Ctrl-C sends SIGINT. Handlers only record the signal; the run reacts between
two steps, on all processes at the same one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from prefopt.losses.distributed import world_size
from prefopt.trainer.saving.random_numbers import same_random_numbers

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN_AFTER_S = 1.0
"""A second Ctrl-C within this time counts as the same: a terminal sends it to every process, and so does torchrun."""


class Stopped(SystemExit):
    """A signal stopped training, and a checkpoint was saved. Uncaught, it ends the process with 128 + the signal.

    Attributes:
        signum: the signal.
        checkpoint: the folder of the checkpoint.
    """

    def __init__(self, signum: int, checkpoint: str):
        super().__init__(128 + signum)
        self.signum = signum
        self.checkpoint = checkpoint


class StopSignals:
    """Context manager that records SIGTERM and SIGINT; a second Ctrl-C quits at once.

    Args:
        says: whether to print at once, on standard error, that a checkpoint will be saved.

    Attributes:
        received: the first signal that this process received, 0 for none.
    """

    def __init__(self, says: bool = True) -> None:
        self.received = 0
        self._says = says
        self._at = 0.0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Context in which signals are recorded; afterwards the earlier handlers are restored."""
        self.received = 0
        # Python allows handlers in the main thread only. In other threads, signals are left as they are.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            # None: a handler that was not set from Python and cannot be restored from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._at = signum, now
            if self._says:
                more = "; Ctrl-C again quits at once, without" if signum == signal.SIGINT else ""
                line = f"\n{signal.Signals(signum).name}: saving a checkpoint at the end of this step{more}\n"
                # Unbuffered: the signal may have come in the middle of a buffered write.
                os.write(2, line.encode())
        elif signum == signal.SIGINT and now - self._at > AGAIN_AFTER_S:
            self._restore()
            signal.raise_signal(signum)

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received; every process must call it at the same point."""
        if world_size() > 1:
            seen = torch.tensor([self.received], device=device)
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            self.received = int(seen)
        return self.received


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises `SystemExit`, as Ctrl-C raises `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class AlreadyTrained(Exception):
    """Raised if the checkpoint to resume from is of the last step."""


class RunFlow(TrainerCallback):
    """Decides when a step ends with a checkpoint, and when the run ends for a signal.

    Args:
        trainer: the trainer it belongs to.

    Attributes:
        signals: received by this process.
        listens: whether a signal ends the run.
        resumed: the state in the checkpoint that the run resumes from, as `checkpoints.read_state` reads it.
        resumed_from: its folder; None for a run from the beginning.
        stopped: the signal that stopped the run; 0 if none did.
        evaluation_due: whether an evaluation was postponed, to write the checkpoint before the process is killed.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._saves_at_end = self._at_epoch_end = False
        self.signals = StopSignals(says=trainer.accelerator.is_main_process)
        self.listens = False
        self.resumed: dict[str, Any] = {}
        self.resumed_from: Path | None = None
        self.stopped = 0
        self.evaluation_due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, saved = self._trainer, self.resumed
        self._saves_at_end = self._at_epoch_end = self.evaluation_due = False
        if self.resumed_from is None:
            return
        # In transformers 5.0 the sum is a local variable, which cannot be set.
        if saved.get("loss") is not None and hasattr(trainer, "_tr_loss"):
            trainer._tr_loss.fill_(saved["loss"])
            trainer._globalstep_last_logged = saved["logged_at"]
            # transformers' last log line has the mean over the steps of this process only.
            trainer._total_loss_scalar = -saved["loss"]
        if saved.get("evaluation_due"):
            # The stopped run postponed it. An online objective samples the same completions as without the stop.
            with same_random_numbers(trainer.accelerator.device):
                trainer._load_rng_state(str(self.resumed_from))
                metrics = trainer._evaluate(None, None)
            trainer._determine_best_metric(metrics=metrics, trial=None)
        if state.global_step >= state.max_steps:
            raise AlreadyTrained

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._heed(control)
        if self.stopped:
            # A checkpoint first: an evaluation may take longer than the time before the kill.
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            control.should_save = True
        if control.should_save and (control.should_training_stop or _ends_epoch(state)):
            # The epoch's end, with its logs and evaluation, follows at once: the checkpoint includes that too.
            control.should_save, self._saves_at_end = False, True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.is_in_train:
            self._heed(control)
            # Between steps, the epoch's end follows, which saves.
            control.should_save = control.should_save or (self._at_epoch_end and bool(self.stopped))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_epoch_end = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._at_epoch_end = True
        if self.stopped:
            over = _ends_epoch(state) or state.global_step >= state.max_steps
            control.should_log = control.should_log and over
            self.evaluation_due = self.evaluation_due or (control.should_evaluate and over)
            control.should_evaluate = False
            control.should_save = True
        control.should_save = control.should_save or self._saves_at_end
        self._saves_at_end = False

    def _heed(self, control: Any) -> None:
        if not self.stopped and self.listens:
            self.stopped = self.signals.agreed(self._trainer.accelerator.device)
        if self.stopped:
            control.should_training_stop = True


def _ends_epoch(state: Any) -> bool:
    return bool(state.epoch == int(state.epoch))
