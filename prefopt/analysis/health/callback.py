"""The rules inside a trainer: serious findings as they appear, all of them at the end, and a stop where asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from prefopt.analysis.health.finding import LEVELS, Finding
from prefopt.analysis.health.history import Settings
from prefopt.analysis.health.rows import examine_rows
from prefopt.analysis.health.saved import save_findings
from prefopt.analysis.health.watch import RULES, Watch, by_level, report, stops
from prefopt.losses.distributed import world_size
from prefopt.safety.errors import UsageError, did_you_mean


def check_stop_on(names: Collection[str]) -> None:
    """Refuse what is neither a level nor a rule.

    Raises:
        UsageError: naming it and what there is.
    """
    if isinstance(names, str):
        raise UsageError(f"stop_on must be a list of names, as in stop_on=({names!r},)")
    known = (*LEVELS, *RULES)
    for name in names:
        if name not in known:
            raise UsageError(
                f"stop_on has {name!r}, which is no level and no rule.{did_you_mean(name, known)} Levels: "
                f"{', '.join(LEVELS)}. Rules: {', '.join(RULES)}"
            )


class HealthCallback(TrainerCallback):  # type: ignore[misc]
    """Says what the logged numbers of a run show: `trainer.add_callback(HealthCallback())`.

    For any transformers trainer that logs our names or those of `trl.DPOTrainer`. It reads the log lines, and before
    training the token ids of the pairs, so it costs no time on the device. Only the main process prints, and writes
    `findings.json` into the output folder when training ends.

    Args:
        stop_on: levels (`serious`, `warning`, `note`) and names of rules that end training after their log line. The
            processes of a run stop together.
        say: prints a line.

    Attributes:
        stopped_by: the finding that ended training; None if none did.

    Raises:
        UsageError: for a name in `stop_on` that is neither a level nor a rule.
    """

    def __init__(self, stop_on: Collection[str] = (), say: Callable[[str], Any] = print):
        check_stop_on(stop_on)
        self.stop_on = tuple(stop_on)
        self.stopped_by: Finding | None = None
        self._say = say
        self._watch: Watch | None = None
        self._of_rows: list[Finding] = []
        self._told: set[str] = set()
        self._trained = False

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, the most serious first."""
        logged = [] if self._watch is None else self._watch.findings
        return by_level([*self._of_rows, *logged])

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        self._of_rows = examine_rows(getattr(train_dataloader, "dataset", None))
        if self._watch is None or self._watch.history.lines:
            self._watch, self._told, self.stopped_by = Watch(), set(), None
        self._trained = False
        self._watch.history.settings = Settings.of(args, state.max_steps)
        for line in state.log_history:  # of the run that is resumed
            self._watch.add(line, int(line.get("step", 0)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self._watch is None:  # an evaluation before training
            self._watch = Watch(Settings.of(args))
        new = self._watch.add(logs or {}, state.global_step)
        # After the report of `on_train_end`, an evaluation of the trained model may add to it.
        self._tell(state, [finding for finding in new if finding.level == LEVELS[0] or self._trained])
        if new and self._trained:
            self._save(args, state)
        if self.stop_on and "loss" in (logs or {}):
            self._stop(stops(new, self.stop_on), args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trained = True
        if state.is_world_process_zero:
            lines = 0 if self._watch is None else self._watch.history.lines
            for line in report(self.findings, lines, self._told):
                self._say(line)
        self._save(args, state)

    def _save(self, args: Any, state: Any) -> None:
        folder = getattr(args, "output_dir", None)
        if state.is_world_process_zero and folder is not None:
            save_findings(Path(folder), self.findings)

    def _tell(self, state: Any, findings: Collection[Finding]) -> None:
        for finding in findings:
            self._told.add(finding.rule)
            if state.is_world_process_zero:
                self._say(f"Health: {finding}")

    def _stop(self, finding: Finding | None, args: Any, state: Any, control: Any) -> None:
        """End training on every process if one of them has a reason to: their logs can differ."""
        stop = finding is not None
        if world_size() > 1:
            any_process = torch.tensor(float(stop), device=args.device)
            dist.all_reduce(any_process, op=dist.ReduceOp.MAX)
            stop = bool(any_process > 0)
        if not stop:
            return
        control.should_training_stop = True
        self.stopped_by = finding
        if state.is_world_process_zero and finding is not None:
            reason = finding.rule if finding.rule in self.stop_on else f"{finding.level} ({finding.rule})"
            self._say(f"Health: training stops at step {state.global_step}, because stop_on has {reason}")
