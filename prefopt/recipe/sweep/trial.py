"""One run of a sweep: a setting with a seed, trained, evaluated and saved as `prefopt train` does it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from prefopt.generation.memory import free_memory
from prefopt.recipe.arguments import Recipe, parse_arguments
from prefopt.recipe.build import make_trainer
from prefopt.recipe.data import Data, load_data
from prefopt.recipe.eval_answers import last_kl
from prefopt.recipe.ready import Ready, preflight
from prefopt.recipe.run import Measured, run
from prefopt.recipe.sweep.measures import HeldoutPairs, measured, row_values
from prefopt.recipe.sweep.plan import as_yaml
from prefopt.recipe.sweep.shared import SharedModel, share_reference, start_logps
from prefopt.report.folder import SWEEP
from prefopt.safety.errors import UsageError, message_of
from prefopt.safety.files import write_text
from prefopt.safety.redaction import redact

DEFAULT_LOSS = "dpo(beta=0.1)"
CONFIG, LOG, TRACEBACK = "config.yaml", "log.txt", "error.txt"
SCHEMA = "prefopt.sweep.run/1"

Report = Callable[[int, dict[str, float]], bool]
"""Gets a step and the measures of its evaluation, and returns whether the run is to stop."""


@dataclass(frozen=True)
class RunResult:
    """How a run of a sweep ended.

    Attributes:
        state: `finished`, `pruned` or `failed`.
        seed: of the run.
        folder: of the run.
        measures: of the last evaluation; empty for a failed run.
        rows: every measure for each held-out pair, KL for each prompt that was answered.
        seconds: of wall clock.
        cpu_seconds: of this process.
        message: why it failed or stopped.
    """

    state: str
    seed: int
    folder: str
    measures: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    message: str = ""


class Pruned(Exception):
    """Ends the training of a trial that is worse than the earlier ones."""


def run_once(
    options: Mapping[str, Any], folder: Path, sweep: Path, shared: SharedModel, report: Report | None = None
) -> RunResult:
    """Run it, unless the folder holds its result. A run that was killed resumes from its last checkpoint, if any.

    Args:
        options: of the recipe, with the seed.
        folder: of the run.
        sweep: the folder of the sweep.
        shared: the model before training.
        report: called after each evaluation during training.
    """
    if (stored := stored_result(folder)) is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, as_yaml(options))
    wall, cpu = time.monotonic(), time.process_time()
    with _outcome(folder, int(options["seed"])) as outcome, _printing_to(folder / LOG):
        outcome.update(_trained(folder, sweep, shared, report))
    free_memory()
    result = RunResult(
        **outcome, seconds=round(time.monotonic() - wall, 2), cpu_seconds=round(time.process_time() - cpu, 2)
    )
    write_text(folder / SWEEP, json.dumps({"schema": SCHEMA, **asdict(result)}) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the model is saved, and nothing will be resumed
    return result


def stored_result(folder: Path) -> RunResult | None:
    """The result of the run in a folder; None if it has not ended."""
    file = folder / SWEEP
    if not file.exists():
        return None
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    stored.pop("schema")
    return RunResult(**stored)


def prepare(config: Path, folder: Path, sweep: Path, words: tuple[str, ...] = ()) -> tuple[Recipe, Ready, Data]:
    """The options, model and rows of a run.

    Args:
        config: of the run.
        folder: of the run.
        sweep: the folder of the sweep.
        words: more of the command line.

    Raises:
        SystemExit, PrefoptError: for what `prefopt train` would refuse too, and for rows that are not held-out pairs.
    """
    recipe = parse_arguments(DEFAULT_LOSS, ["--config", str(config), "--output_dir", str(folder), *words])
    share_reference(recipe, sweep / "reference")
    ready = preflight(recipe)
    data = load_data(recipe, ready)
    if data.heldout is None:
        raise UsageError(
            "a sweep compares trials on held-out rows, and there are none: set eval_rows, or name a split"
        )
    if not {"chosen", "rejected"} <= set(data.heldout.column_names):
        raise UsageError(
            f"a sweep compares losses on held-out pairs, and the held-out rows have {data.heldout.column_names}: name "
            "a data set with chosen and rejected"
        )
    if recipe.objective is None:
        raise UsageError("a sweep needs losses of prefopt, and TRL computes this one itself: name a loss")
    return recipe, ready, data


def _trained(folder: Path, sweep: Path, shared: SharedModel, report: Report | None) -> dict[str, Any]:
    recipe, ready, data = prepare(folder / CONFIG, folder, sweep, ("--resume_from_checkpoint", "auto"))
    trainer = make_trainer(recipe, ready, data, shared.copy(ready, recipe))
    pairs = HeldoutPairs(trainer)
    trainer.add_callback(pairs)
    start = start_logps(sweep, trainer, pairs, recipe, ready, data)

    def result(state: str, message: str = "") -> dict[str, Any]:
        assert pairs.last is not None
        rows = row_values(pairs.last, start)
        if kl := last_kl(trainer):
            rows["kl"] = kl
        measures = measured(rows)
        if not all(map(math.isfinite, measures.values())):
            raise UsageError("held-out log-probabilities are not finite after training: lower the learning rate")
        return {"state": state, "measures": measures, "rows": rows, "message": message}

    if report is not None:
        trainer.add_callback(_Reporter(report, lambda: result("")["measures"]))
    try:
        run(recipe, trainer, before=Measured(), start=shared.model)
    except Pruned:
        return result(
            "pruned", f"stopped at step {trainer.state.global_step}: worse than the median of earlier trials"
        )
    return result("finished")


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports each evaluation during training, and stops a run where the report says so."""

    def __init__(self, report: Report, measures: Callable[[], dict[str, float]]):
        self._report, self._measures = report, measures
        self._training = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._training = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training and self._report(state.global_step, self._measures()):
            raise Pruned


@contextlib.contextmanager
def _outcome(folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The fields of a run's result; what ends the run early and is not a stop of the whole sweep is one of them."""
    outcome: dict[str, Any] = {"seed": seed, "folder": str(folder)}
    try:
        yield outcome
    except (SystemExit, Exception) as error:
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise  # a signal
        message = str(error.code) if isinstance(error, SystemExit) else message_of(error)
        if message is None:
            write_text(folder / TRACEBACK, redact(traceback.format_exc()))
            message = f"{type(error).__name__}: {redact(str(error))[:400]} (traceback in {folder / TRACEBACK})"
        outcome.update(state="failed", message=message)


@contextlib.contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """What the run prints goes to a file: the sweep prints a line per run."""
    with file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield
