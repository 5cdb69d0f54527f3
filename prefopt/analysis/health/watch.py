"""The rules, applied to a log line by line, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from prefopt.analysis.health.finding import LEVELS, Finding
from prefopt.analysis.health.history import FEW, History, Settings
from prefopt.analysis.health.learning import below_chance, evaluation_diverges, learns_nothing, saturated
from prefopt.analysis.health.likelihood import chosen_falls, entangled, margin_is_length, over_optimised
from prefopt.analysis.health.stability import (
    always_clipped,
    entropy_collapses,
    gradient_spikes,
    loss_rises,
    not_finite,
)
from prefopt.report.folder import number

RULES: Mapping[str, Callable[[History], Finding | None]] = {
    rule.__name__: rule
    for rule in (
        not_finite, over_optimised, chosen_falls, margin_is_length, below_chance, learns_nothing, loss_rises,
        evaluation_diverges, entropy_collapses, gradient_spikes, entangled, saturated, always_clipped,
    )
}  # fmt: skip
"""Name -> rule. Every rule reads the history up to now; the first log line at which it holds is reported."""

_SAID_BY = {"chosen_falls": "over_optimised", "saturated": "over_optimised"}
"""Findings that are left out beside another one, which says the same and more."""
SHOWN = 5
"""Findings that a report shows in full."""


class Watch:
    """Applies the rules to a run, log line by log line.

    Args:
        settings: of the run, as far as they are known.
    """

    def __init__(self, settings: Settings | None = None):
        self.history = History(settings or Settings())
        self._first: dict[str, Finding] = {}

    def add(self, line: Mapping[str, Any], step: int) -> list[Finding]:
        """Read a log line; returns the findings that are new with it."""
        if not self.history.add(line, step):
            return []
        new = []
        for name, rule in RULES.items():
            if name not in self._first and (finding := rule(self.history)) is not None:
                self._first[name] = finding
                new.append(finding)
        return [finding for finding in new if _SAID_BY.get(finding.rule) not in self._first]

    @property
    def findings(self) -> list[Finding]:
        """All findings so far, the most serious first."""
        return by_level(finding for finding in self._first.values() if _SAID_BY.get(finding.rule) not in self._first)


def by_level(findings: Iterable[Finding]) -> list[Finding]:
    """The most serious first, then the earliest."""
    return sorted(findings, key=lambda finding: (LEVELS.index(finding.level), finding.step))


def examine(log_history: Iterable[Mapping[str, Any]], settings: Settings | None = None) -> list[Finding]:
    """What the log of a run says about it, the most serious first.

    Args:
        log_history: log lines, as transformers keeps them in `trainer.state.log_history` and `trainer_state.json`.
        settings: of the run, as far as they are known; `Settings.of(trainer.args, trainer.state.max_steps)`.
    """
    return examined(log_history, settings).findings


def examined(log_history: Iterable[Mapping[str, Any]], settings: Settings | None = None) -> Watch:
    """A watch that has read a whole log."""
    watch = Watch(settings)
    for line in log_history:
        step = number(line.get("step"))
        watch.add(line, int(step) if step is not None and math.isfinite(step) else watch.history.step)
    return watch


def too_few(lines: int) -> str:
    """A sentence if a run has logged too few lines to be called healthy; else ""."""
    if lines >= FEW:
        return ""
    told = f"{lines} log line{'' if lines == 1 else 's'} of training"
    return f"{told}, too few to judge ({FEW} are enough; --logging_steps 1 logs each step)"


def report(findings: Collection[Finding], lines: int, told: Collection[str] = ()) -> list[str]:
    """The lines to print at the end of a run.

    Args:
        findings: the most serious first.
        lines: log lines of training.
        told: rules whose finding was printed during the run; they are only named.
    """
    if not findings and too_few(lines):
        return [f"Health: {too_few(lines)}"]
    if not findings:
        return ["Health: nothing unusual in the logged numbers"]
    shown = [
        f"Health: {finding.level} ({finding.rule}, step {finding.step}), told above"
        if finding.rule in told
        else f"Health: {finding}"
        for finding in list(findings)[:SHOWN]
    ]
    if more := len(findings) - SHOWN:
        shown += [f"Health: and {more} more"] * (more > 0)
    return shown


def stops(findings: Iterable[Finding], stop_on: Collection[str]) -> Finding | None:
    """The first finding whose rule or level is in `stop_on`."""
    return next((finding for finding in findings if finding.rule in stop_on or finding.level in stop_on), None)
