"""The logs and findings of saved runs: ours, and checkpoints of any transformers trainer. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import Settings
from prefopt.analysis.health.watch import examined
from prefopt.report.folder import BEFORE, FINDINGS, LOG, number, read_log
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.files import write_text

FINDINGS_VERSION = 1
"""Of the layout of `findings.json`; a new field of a finding does not change it."""


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
    what = message.rpartition(". ")[0] if message.endswith(":") else message  # the rows follow on further lines
    remedy = "look at those rows, a lower learning rate, bfloat16 or float32 in place of float16"
    return Finding("not_finite", "serious", step, what, remedy)


def examine_saved(run: Path, beta: float | None = None) -> list[Finding]:
    """What the log of a saved run says about it, the most serious first.

    Args:
        run: an output folder, a checkpoint, or the file of a log.
        beta: of a run of TRL, whose log has rewards (beta times the log-ratio) but no log-ratios.

    Raises:
        UsageError: if there is no log, or none that can be read.
    """
    return lines_and_findings(run, beta)[1]


def lines_and_findings(run: Path, beta: float | None = None) -> tuple[int, list[Finding]]:
    """`examine_saved`, and how many log lines of training there are to judge by."""
    file, content, lines = read_log(run)
    settings = _settings(content)
    if beta is not None:
        settings = replace(settings, beta=beta)
    watch = examined([*_before(file.parent), *lines], settings)
    findings = watch.findings
    if (ended := content.get("not_finite")) is not None:
        findings.insert(0, ended_by(int(number(content.get("global_step")) or 0), str(ended)))
    return watch.history.lines, findings


def _settings(content: dict[str, Any]) -> Settings:
    """The settings in a log file; one that has another type than it was written with is not known."""
    known = content.get("settings")
    known = known if isinstance(known, dict) else {}
    rate, norm, beta = (number(known.get(name)) for name in ("learning_rate", "max_grad_norm", "beta"))
    steps = number(content.get("max_steps")) or number(content.get("global_step"))
    return Settings(
        learning_rate=rate, max_grad_norm=norm, beta=beta or None,
        max_steps=int(steps) if steps and math.isfinite(steps) and steps > 0 else None,
        fp16=known["fp16"] if isinstance(known.get("fp16"), bool) else None,
        loss=known["loss"] if isinstance(known.get("loss"), str) else None,
    )  # fmt: skip


def _before(folder: Path) -> list[dict[str, Any]]:
    """The evaluation before training, which transformers drops from the log when training begins."""
    file = folder / BEFORE
    if not file.is_file():
        return []
    with retold(UsageError, f"{file} cannot be read (without it, the log alone is examined)"):
        content = json.loads(file.read_text(encoding="utf-8"))
    metrics = content.get("before") if isinstance(content, dict) else None
    return [{**metrics, "step": 0}] if isinstance(metrics, dict) else []
