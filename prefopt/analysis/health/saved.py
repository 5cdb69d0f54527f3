"""The logs and findings of saved runs: ours, and checkpoints of any transformers trainer.

Imports the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import Settings
from prefopt.analysis.health.watch import examined
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.files import write_text

LOG = "log_history.json"
"""The log of a run in its folder, also where no checkpoint was saved."""
FINDINGS = "findings.json"
"""What the rules said about a run, in its folder from the end of training on."""
FINDINGS_VERSION = 1
"""Of that file's layout; a new field of a finding does not change it."""
STATE = "trainer_state.json"
"""transformers' file of the same in a checkpoint."""
_BEFORE = "before.json"


def save_log(folder: Path, state: Any, settings: Settings, not_finite: str | None = None) -> None:
    """Write the log of a run into its folder, whole or not at all.

    Args:
        folder: of the run.
        state: transformers' `trainer.state`.
        settings: of the run.
        not_finite: why the run ended, if a loss or gradient was NaN or infinite: such a step is not logged.
    """
    content = {
        "global_step": state.global_step,
        "max_steps": settings.max_steps,
        "settings": {name: value for name, value in vars(settings).items() if value is not None},
        **({} if not_finite is None else {"not_finite": not_finite}),
        "log_history": state.log_history,
    }
    write_text(folder / LOG, json.dumps(content) + "\n")


def save_findings(folder: Path, findings: Iterable[Finding]) -> None:
    """Write `findings.json`, whole or not at all: `{"version": 1, "findings": [...]}`, no findings for a healthy run.

    Each finding is an object with the fields of `Finding`.
    """
    content = {"version": FINDINGS_VERSION, "findings": [finding.as_object() for finding in findings]}
    write_text(folder / FINDINGS, json.dumps(content, indent=2) + "\n")


def ended_by(step: int, message: str) -> Finding:
    """The finding of a run that ended with a loss or gradient that is NaN or infinite.

    Args:
        step: at which.
        message: what was not finite.
    """
    remedy = "look at those rows, a lower learning rate, bfloat16 or float32 in place of float16"
    return Finding("not_finite", "serious", step, message, remedy)


def log_file(run: Path) -> Path:
    """The file with a run's log: the run's folder, a checkpoint, or the file itself.

    Raises:
        UsageError: if there is none.
    """
    if run.is_file():
        return run
    for name in (LOG, STATE):
        if (file := run / name).is_file():
            return file
    numbered = [folder for folder in run.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(numbered, key=lambda folder: -int(folder.name.removeprefix("checkpoint-"))):
        if (file := folder / STATE).is_file():
            return file
    missing = "there is no such folder" if not run.exists() else f"it has no {LOG}, and no checkpoint with {STATE}"
    raise UsageError(f"{run}: {missing}. Name the output folder of a run, or one of its checkpoints")


def examine_saved(run: Path, beta: float | None = None) -> list[Finding]:
    """What the log of a saved run says about it, the most serious first.

    Args:
        run: as for `log_file`.
        beta: of a run of TRL, whose log has rewards (beta times the log-ratio) but no log-ratios.

    Raises:
        UsageError: if there is no log, or none that can be read.
    """
    return lines_and_findings(run, beta)[1]


def lines_and_findings(run: Path, beta: float | None = None) -> tuple[int, list[Finding]]:
    """`examine_saved`, and how many log lines of training there are to judge by."""
    file = log_file(run)
    with retold(UsageError, f"{file} cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
    lines = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise UsageError(f"{file} has no list log_history: it is not the log of a run")
    known = content.get("settings") or {}
    fields = {name: known[name] for name in vars(Settings()) if name in known}
    settings = replace(Settings(**fields), max_steps=content.get("max_steps") or content.get("global_step"))
    if beta is not None:
        settings = replace(settings, beta=beta)
    watch = examined([*_before(file.parent), *lines], settings)
    findings = watch.findings
    if (ended := content.get("not_finite")) is not None:
        findings.insert(0, ended_by(content.get("global_step", 0), str(ended)))
    return watch.history.lines, findings


def _before(folder: Path) -> list[dict[str, Any]]:
    """The evaluation before training, which transformers drops from the log when training begins."""
    file = folder / _BEFORE
    if not file.is_file():
        return []
    with retold(UsageError, f"{file} cannot be read"):
        metrics = json.loads(file.read_text(encoding="utf-8")).get("before")
    return [{**metrics, "step": 0}] if metrics else []
