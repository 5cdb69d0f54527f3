"""What a run folder holds, read for its pages: of prefopt, or of any transformers trainer as far as its log goes.

Files are JSON. One that cannot be read is named on the page; only the log is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.safety.errors import UsageError, retold

LOG = "log_history.json"
"""The log of a run of prefopt, also where no checkpoint was saved."""
FINDINGS = "findings.json"
"""What the rules of its health said, from the end of training on."""
BEFORE = "before.json"
"""The evaluation before training, which transformers drops from the log when training begins."""
STATE = "trainer_state.json"
"""transformers' file of the same in a checkpoint."""
FACTS = "run.json"
ANSWERS = "answers.json"
PAIRS = "heldout.json"
SWEEP = "sweep_run.json"
"""Of a run of `prefopt sweep`: measures that are computed alike for every loss, and their values for each pair."""
PAGE = "report.html"
BESIDE_THE_MODEL = (BEFORE, LOG, FINDINGS, FACTS, ANSWERS, PAIRS, PAGE)
"""What a run leaves about itself; none of it belongs to the model."""

_CHECKPOINT = "checkpoint-"
_NOT_MEASURED = ("runtime", "per_second", "total_flos", "preparation_time", "epoch", "step")


@dataclass(frozen=True)
class Curve:
    """One logged number over the steps; `missing` are steps at which it was NaN or infinite."""

    steps: list[int]
    values: list[float]
    missing: list[int] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.values[-1]


def ends_in_nan(curve: Curve) -> bool:
    """Whether the number was NaN or infinite when it was logged last, so that `last` is of an earlier step."""
    return bool(curve.missing) and curve.missing[-1] > curve.steps[-1]


@dataclass(frozen=True)
class RunFolder:
    """What was read.

    Attributes:
        path: the folder, or the checkpoint or log file that was named.
        log: the file of the log, without its lines.
        curves: by name; those of evaluations begin with `eval_`.
        lines: how many lines the log has.
        facts: `run.json`: loss, data, settings, versions.
        results: `results.json`.
        findings: of the run's health.
        answers: to the same prompts at several steps: `{"prompts": [...], "answers": [{"step", "texts"}]}`.
        pairs: the held-out rows at the end, with their log-ratios.
        sweep: of a run of a sweep: `{"measures": {name: value}, "rows": {name: [value of each held-out pair]}}`.
        unread: files that could not be read, and why.
    """

    path: Path
    log: Mapping[str, Any]
    curves: Mapping[str, Curve]
    lines: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    findings: list[Mapping[str, Any]] = field(default_factory=list)
    answers: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def loss(self) -> str:
        """The loss as it was trained with, or "" for a run that does not say."""
        settings = _mapping(self.log.get("settings"))
        return str(self.facts.get("loss") or self.results.get("loss") or settings.get("loss") or "")

    @property
    def last_step(self) -> int:
        return max((curve.steps[-1] for curve in self.curves.values() if curve.steps), default=0)


def log_file(run: Path) -> Path:
    """The file with a run's log: in the run's folder, in its newest checkpoint, or the file itself.

    Raises:
        UsageError: if there is none.
    """
    if run.is_file():
        return run
    checkpoints = [path for path in run.glob(f"{_CHECKPOINT}*") if path.name.removeprefix(_CHECKPOINT).isdecimal()]
    newest_first = sorted(checkpoints, key=lambda path: -int(path.name.removeprefix(_CHECKPOINT)))
    for file in (run / LOG, run / STATE, *(folder / STATE for folder in newest_first)):
        if file.is_file():
            return file
    missing = f"it has no {LOG}, and no checkpoint with {STATE}" if run.exists() else "there is no such folder"
    below = [file.parent for pattern in (f"*/{LOG}", f"*/*/{LOG}") for file in sorted(run.glob(pattern))]
    if below:  # a sweep, or a folder of runs
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        raise UsageError(f"{run}: {missing}. It has runs in {', '.join(map(str, below[:3]))}{more}: name these")
    raise UsageError(f"{run}: {missing}. Name the output folder of a run, or one of its checkpoints")


def read_log(run: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The file of `log_file`, its content and the lines of its log.

    Raises:
        UsageError: if there is no log, or none that can be read.
    """
    file = log_file(run)
    with retold(UsageError, f"{file} cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
    lines = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise UsageError(f"{file} has no list log_history: it is not the log of a run")
    return file, content, lines


def read_run(run: Path, beta: float | None = None) -> RunFolder:
    """Read a run's folder.

    Args:
        run: an output folder, a checkpoint, or the file of a log.
        beta: of a run of TRL, whose log has rewards (beta times the log-ratio) but no log-ratios.

    Raises:
        UsageError: if there is no log, or none that can be read.
    """
    file, content, lines = read_log(run)
    folder = run if run.is_dir() else file.parent
    unread: list[str] = []
    before = _mapping(_json(folder / BEFORE, unread))
    first = _mapping(before.get("before"))
    curves = _without_ties(_curves([{**first, "step": 0}, *lines] if first else lines))
    results = _mapping(_json(folder / "results.json", unread))
    return RunFolder(
        path=run,
        log={name: value for name, value in content.items() if name != "log_history"},
        curves={**curves, **_ratios(curves, beta)},
        lines=len(lines),
        facts=_mapping(_json(folder / FACTS, unread)),
        results=results,
        findings=_findings(_json(folder / FINDINGS, unread), results),
        answers=_mapping(_json(folder / ANSWERS, unread)),
        pairs=_mapping(_json(folder / PAIRS, unread)),
        sweep=_mapping(_json(folder / SWEEP, unread)),
        unread=unread,
    )


def number(value: Any) -> float | None:
    """A logged value as a number, NaN and infinities included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """The numbers of a log by name. Of two lines about one step, the later counts: a run that was resumed."""
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is None or not math.isfinite(step) or "train_runtime" in line:
            continue
        place = int(step)
        for name, value in line.items():
            if (values := points.get(name)) is None:
                if name.endswith(_NOT_MEASURED):
                    continue
                values = points[name] = {}
            if (known := number(value)) is not None:
                values[place] = known
    curves = {}
    for name, values in points.items():
        missing = sorted(step for step, value in values.items() if not math.isfinite(value))
        steps = sorted(values.keys() - missing)
        if steps:
            curves[name] = Curve(steps, [values[step] for step in steps], missing)
    return curves


def _without_ties(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Without the accuracies of a policy that is still its reference: all rewards are equal, which counts as wrong."""
    for name, accuracies in list(curves.items()):
        margins = (
            curves.get(name.removesuffix("accuracies") + "margins") if name.endswith("rewards/accuracies") else None
        )
        if margins is None:
            continue
        ties = {step for step, value in _points(margins) if abs(value) < 1e-9}
        rest = [(step, value) for step, value in _points(accuracies) if step not in ties]
        if rest and len(rest) < len(accuracies.steps):
            curves[name] = Curve([step for step, _ in rest], [value for _, value in rest], accuracies.missing)
    return curves


def _ratios(curves: Mapping[str, Curve], beta: float | None) -> dict[str, Curve]:
    """Log-ratios in nats from TRL's rewards, and margins from log-ratios."""
    derived: dict[str, Curve] = {}
    prefixes = {name.partition("rewards/")[0] for name in curves if name.partition("rewards/")[1]}
    prefixes |= {name.partition("ratios/")[0] for name in curves if name.partition("ratios/")[1]}
    for prefix in prefixes:
        for role in ("chosen", "rejected"):
            rewards, name = curves.get(f"{prefix}rewards/{role}"), f"{prefix}ratios/{role}"
            if beta and rewards is not None and name not in curves:
                derived[name] = Curve(rewards.steps, [value / beta for value in rewards.values], rewards.missing)
        both = {**curves, **derived}
        chosen, rejected = (both.get(f"{prefix}ratios/{role}") for role in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            other = dict(zip(rejected.steps, rejected.values, strict=True))
            margins = [(step, value - other[step]) for step, value in _points(chosen) if step in other]
            if margins:
                derived[f"{prefix}ratios/margins"] = Curve([s for s, _ in margins], [value for _, value in margins])
    return derived


def _points(curve: Curve) -> list[tuple[int, float]]:
    return list(zip(curve.steps, curve.values, strict=True))


def _json(file: Path, unread: list[str]) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        unread.append(f"{file.name}: {error}")
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _findings(file: Any, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of `findings.json`, a list or an object with one; of `results.json` for older runs."""
    found = file.get("findings") if isinstance(file, dict) else file
    found = results.get("findings") if found is None else found
    return [finding for finding in found if isinstance(finding, dict)] if isinstance(found, list) else []
