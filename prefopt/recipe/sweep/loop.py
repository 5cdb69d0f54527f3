"""A sweep from its config to its comparison page: check, train every trial, compare. A stopped one continues."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from prefopt.recipe.sweep.check import check_settings
from prefopt.recipe.sweep.outcome import Outcome, Tried, as_csv, as_json, outcome_of, verdict
from prefopt.recipe.sweep.plan import SweepPlan, as_yaml, read_plan
from prefopt.recipe.sweep.shared import SharedModel
from prefopt.recipe.sweep.show import first_line, headline, planned, ranked, run_line
from prefopt.recipe.sweep.study import Study, Trial
from prefopt.recipe.sweep.trial import RunResult, run_once, stored_result
from prefopt.recipe.sweep.workers import SweepCall, devices, run_workers
from prefopt.report import compare_runs
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text


def run_sweep(call: SweepCall, console: Console, dry_run: bool = False) -> dict[str, Any] | None:
    """Run a sweep, or what is left of it.

    Args:
        call: the config and what replaces parts of it.
        console: prints a line per run.
        dry_run: check and list the trials only.

    Returns:
        The content of the sweep's `results.json`; None after a dry run.

    Raises:
        UsageError: if the config, or a setting of it, cannot be used; nothing is trained then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("prefopt sweep starts a process per GPU itself: run it without accelerate launch or torchrun")
    say = _sayer(console)
    plan = read_plan(call.config, call.changes, call.folder)
    say(headline(plan))
    check_settings(plan)
    if dry_run:
        console.print(planned(plan))
        say("Dry run: every setting was checked, and nothing was trained.")
        return None
    study = Study(plan)
    try:
        with FileLock(str(plan.folder / "sweep.lock"), timeout=0):
            if study.begun:
                say(f"Continuing the sweep in {plan.folder}")
            study.enqueue()
            if len(names := devices()) > 1:
                say(f"{len(names)} devices: a process each")
                run_workers(call, names)
            else:
                work(plan, study, console)
            return _concluded(plan, study, console)
    except Timeout:
        raise UsageError(f"another process runs the sweep in {plan.folder}: wait for it, or stop it") from None
    except (KeyboardInterrupt, SystemExit):
        say(f"Stopped. Finished trials are stored. To continue: {call.command}")
        raise


def run_worker(call: SweepCall, console: Console) -> None:
    """What each process of `run_workers` does."""
    plan = read_plan(call.config, call.changes, call.folder)
    work(plan, Study(plan), console)


def _sayer(console: Console) -> Any:
    return partial(console.print, soft_wrap=True, markup=False, highlight=False)


# ---- trials --------------------------------------------------------------------------------------------------------


def work(plan: SweepPlan, study: Study, console: Console) -> None:
    """Run trials until all have been started."""
    shared, say = SharedModel(), _sayer(console)
    while (trial := study.next()) is not None:
        results: list[RunResult] = []
        for seed in plan.seeds:
            # The first seed decides about pruning for all.
            report = _report_of(trial, plan) if plan.prune and not results else None
            folder = run_folder(plan, trial.number, seed)
            results.append(run_once(plan.options(trial.setting, seed), folder, plan.folder, shared, report))
            say(run_line(plan, trial, results[-1]))
            if results[-1].state != "finished":
                break
        last = results[-1]
        of_seed = f"seed {last.seed}: " if len(plan.seeds) > 1 and last.message else ""
        means = {} if last.state == "failed" else _means(results)
        state, message = last.state, last.message
        if state != "failed" and (missing := [name for name in plan.measures if name not in means]):
            state, message = "failed", f"{missing[0]} was not measured: no starting model was in memory"
        study.finish(trial, state, means, of_seed + message)


def run_folder(plan: SweepPlan, trial: int, seed: int) -> Path:
    """The folder of a run."""
    return plan.folder / f"trial-{trial:03d}" / f"seed-{seed}"


def _report_of(trial: Trial, plan: SweepPlan) -> Any:
    measure = next(iter(plan.measures))
    return lambda step, measures: trial.report(step, measures[measure])


def _means(results: list[RunResult]) -> dict[str, float]:
    return {name: sum(run.measures[name] for run in results) / len(results) for name in results[0].measures}


# ---- the end -------------------------------------------------------------------------------------------------------


def _concluded(plan: SweepPlan, study: Study, console: Console) -> dict[str, Any]:
    """Rank the trials, write results, the best config and the comparison page, and say where they are."""
    say = _sayer(console)
    outcome = outcome_of(plan, [_tried(plan, trial) for trial in study.trials()])
    results = as_json(outcome)
    write_text(plan.folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(plan.folder / "results.csv", as_csv(outcome))
    console.print(ranked(outcome))
    for trial in outcome.trials:
        if trial.state == "failed":
            say(f"Trial {trial.number} failed: {first_line(trial.message)}")
    for line in verdict(outcome):
        say(line)
    if outcome.best is None:
        raise UsageError(f"no trial finished: {plan.folder}/results.csv has the messages")
    write_text(plan.folder / "best.yaml", as_yaml(plan.options(outcome.best.setting, plan.seeds[0])))
    for line in _places(plan, outcome):
        say(line)
    return results


def _places(plan: SweepPlan, outcome: Outcome) -> list[str]:
    """Where everything is; makes the comparison page."""
    folders = [Path(run.folder) for trial in outcome.trials if trial.state == "finished" for run in trial.runs]
    page = [f"Page: {compare_runs(folders, plan.folder)}"] if len(folders) > 1 else []
    best = shlex.quote(str(plan.folder / "best.yaml"))
    return [
        *page,
        f"Results: {plan.folder}/results.json and results.csv",
        f"Best model: {outcome.best.runs[0].folder if outcome.best else ''}",
        f"To train it alone: prefopt train --config {best} --output_dir runs/best",
    ]


def _tried(plan: SweepPlan, trial: Trial) -> Tried:
    stored = [stored_result(run_folder(plan, trial.number, seed)) for seed in plan.seeds]
    runs = tuple(run for run in stored if run is not None)
    return Tried(trial.number, trial.setting, trial.state, trial.message, runs)
