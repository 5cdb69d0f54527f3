"""What a sweep prints: its plan, a line per run, and the ranked trials."""

from __future__ import annotations

from rich.table import Table

from prefopt.recipe.sweep.outcome import Outcome
from prefopt.recipe.sweep.plan import Range, SweepPlan, shown, value_text
from prefopt.recipe.sweep.study import Trial
from prefopt.recipe.sweep.trial import RunResult
from prefopt.safety.tables import table


def headline(plan: SweepPlan) -> str:
    """The sweep in one line."""
    count, seeds = plan.trials, len(plan.seeds)
    what = f"{count} trial{'s' if count != 1 else ''}" + (f" of {seeds} seeds" if seeds > 1 else "")
    over = ", ".join(plan.axes) or "seeds"
    return f"Sweep: {what} over {over} ({plan.method}), compared by {', '.join(plan.measures)}; in {plan.folder}"


def planned(plan: SweepPlan) -> Table:
    """The trials of a grid; the axes of a search, whose trials are drawn one after the other."""
    if plan.method == "grid":
        trials = table("trial", *plan.axes, right=("trial",))
        for number, setting in enumerate(plan.grid()):
            trials.add_row(str(number), *map(value_text, setting.values()))
        return trials
    axes = table("option", "values", title=f"{plan.trials} trials are drawn from")
    for name, axis in plan.axes.items():
        if isinstance(axis, Range):
            axes.add_row(name, f"{axis.low:g} to {axis.high:g}{', by ratio' if axis.log else ''}")
        else:
            axes.add_row(name, ", ".join(map(value_text, axis)))
    return axes


def run_line(plan: SweepPlan, trial: Trial, result: RunResult) -> str:
    """How a run ended."""
    seed = f" seed={result.seed}" if len(plan.seeds) > 1 else ""
    head = f"Trial {trial.number} ({trial.number + 1} of {plan.trials}), {shown(trial.setting)}{seed}:"
    if result.state == "failed":
        return f"{head} failed: {first_line(result.message)}"
    numbers = "  ".join(f"{name} {result.measures[name]:.4g}" for name in _columns(plan))
    end = "" if result.state == "finished" else f"  {result.message}"
    return f"{head} {numbers}  {result.seconds:.0f} s{end}"


def first_line(message: str) -> str:
    """Of a message; the others are in the results."""
    line = message.partition("\n")[0]  # a colon at its end announces the others
    return line.rpartition(". ")[0] if line.endswith(":") and ". " in line else line


def ranked(outcome: Outcome) -> Table:
    """All trials, the best finished ones first."""
    plan = outcome.plan
    columns = _columns(plan)
    trials = table("trial", *plan.axes, *columns, "state", right=("trial", *columns))
    numbers = [one.trial for one in outcome.differences]
    places = {number: place for place, number in enumerate(numbers)}
    if outcome.best is not None:
        places[outcome.best.number] = -1
    for trial in sorted(outcome.trials, key=lambda trial: (places.get(trial.number, len(numbers)), trial.number)):
        measured = bool(trial.runs and trial.runs[0].measures)
        values = [f"{trial.mean(name):.4g}" if measured else "" for name in columns]
        setting = [value_text(trial.setting[name]) if name in trial.setting else "" for name in plan.axes]
        trials.add_row(str(trial.number), *setting, *values, trial.state)
    return trials


def _columns(plan: SweepPlan) -> list[str]:
    return list(dict.fromkeys([*plan.measures, "accuracy", "margin", "chosen"]))
