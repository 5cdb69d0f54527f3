"""The trials of a sweep in an optuna study, stored as SQLite in the sweep's folder.

The only file that imports optuna. A trial is a setting; its runs, one per seed, are in `prefopt.recipe.sweep.trial`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from prefopt.recipe.sweep.plan import SweepPlan, as_text
from prefopt.safety.errors import UsageError, retold

NAME = "sweep"
FILE = "study.db"
NO_OPTUNA = (
    'prefopt sweep needs optuna, which is not installed: pip install "prefopt-trainer[sweep]", or pip install optuna'
)
PRUNE_AFTER = 3
"""Trials that must have reached a step before their median stops others."""


@dataclass(frozen=True)
class Trial:
    """A setting that is to be run, or has been.

    Attributes:
        number: from 0.
        setting: the values of the axes.
        state: `running`, `finished`, `pruned`, `failed` or `waiting`.
        message: why it failed or stopped.
        handle: optuna's trial, of one that is to be run.
    """

    number: int
    setting: dict[str, Any]
    state: str = "running"
    message: str = ""
    handle: Any = None

    def report(self, step: int, value: float) -> bool:
        """Store the value of an evaluation, and return whether the trial is worse than the median of earlier ones."""
        self.handle.report(value, step)
        return bool(self.handle.should_prune())


class Study:
    """The study of a sweep.

    Args:
        plan: of the sweep; its folder holds the study, or will.

    Raises:
        UsageError: if optuna is missing, or the folder holds a sweep with other settings.
    """

    def __init__(self, plan: SweepPlan):
        self._optuna = _optuna()
        self._plan = plan
        with retold(UsageError, f"{plan.folder} cannot be the folder of a sweep"):
            plan.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(plan.folder / f"{FILE}.lock"))
        self._storage = self._optuna.storages.RDBStorage(f"sqlite:///{(plan.folder / FILE).absolute()}")
        pruner = self._optuna.pruners.MedianPruner(n_startup_trials=PRUNE_AFTER)
        with self._lock:
            self._study = self._optuna.create_study(
                storage=self._storage, study_name=NAME, load_if_exists=True,
                directions=list(plan.measures.values()),
                pruner=pruner if plan.prune else self._optuna.pruners.NopPruner(),
            )  # fmt: skip
            self._refuse_another_sweep()

    def _refuse_another_sweep(self) -> None:
        wanted = json.loads(json.dumps(self._plan.identity(), default=str))
        stored = self._study.user_attrs.get("identity")
        if stored is None:
            self._study.set_user_attr("identity", wanted)
        elif stored != wanted:
            raise UsageError(
                f"{self._plan.folder} holds a sweep with other settings ({_changes(stored, wanted)}): use another "
                "--output_dir, or delete the folder"
            )

    @property
    def begun(self) -> bool:
        return bool(self._study.get_trials(deepcopy=False))

    def enqueue(self) -> None:
        """Queue every setting of a grid, and every trial that a killed process left behind.

        Only for the one process that starts the others.
        """
        states = self._optuna.trial.TrialState
        study_id = self._storage.get_study_id_from_name(NAME)
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            number = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            self._storage.set_trial_state_values(number, states.WAITING)
        if self._plan.method == "grid":
            there = len(self._study.get_trials(deepcopy=False))
            for setting in self._plan.grid()[there:]:
                self._study.enqueue_trial({name: as_text(value) for name, value in setting.items()})

    def next(self) -> Trial | None:
        """The next trial to run, queued or newly drawn; None when all have been started."""
        states = self._optuna.trial.TrialState
        with self._lock:
            trials = self._study.get_trials(deepcopy=False)
            number = next((trial.number for trial in trials if trial.state == states.WAITING), len(trials))
            if number >= self._plan.trials:
                return None
            # A sampler of its own for each trial, so that a continued search draws what an unbroken one would.
            self._study.sampler = self._sampler(number)
            handle = self._study.ask()
            setting = {name: self._drawn(handle, name, axis) for name, axis in self._plan.axes.items()}
            return Trial(handle.number, setting, handle=handle)

    def _sampler(self, number: int) -> Any:
        samplers, seed = self._optuna.samplers, self._plan.search_seed * 100_003 + number
        if self._plan.method == "tpe":
            return samplers.TPESampler(seed=seed)
        return samplers.RandomSampler(seed=seed)

    def _drawn(self, handle: Any, name: str, axis: Any) -> Any:
        if (values := self._plan.values(name)) is None:
            if axis.whole:
                return handle.suggest_int(name, int(axis.low), int(axis.high), log=axis.log)
            return handle.suggest_float(name, axis.low, axis.high, log=axis.log)
        by_text = {as_text(value): value for value in values}
        return by_text[handle.suggest_categorical(name, list(by_text))]

    def finish(self, trial: Trial, state: str, values: Mapping[str, float], message: str) -> None:
        """Store how a trial ended.

        Args:
            trial: of `next`.
            state: `finished`, `pruned` or `failed`.
            values: the plan's measures; not read for a failed trial.
            message: why it failed or stopped.
        """
        states = self._optuna.trial.TrialState
        trial.handle.set_user_attr("message", message)
        trial.handle.set_user_attr("measures", dict(values))
        ends = {"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        numbers = [values[name] for name in self._plan.measures] if state == "finished" else None
        self._study.tell(trial.handle, numbers, state=ends[state])

    def trials(self) -> list[Trial]:
        """All trials so far, in order."""
        names = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
        return [
            Trial(
                trial.number,
                self._setting(trial.params),
                names.get(trial.state.name, "waiting"),
                trial.user_attrs.get("message", ""),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]

    def _setting(self, params: Mapping[str, Any]) -> dict[str, Any]:
        setting = {}
        for name in [name for name in self._plan.axes if name in params]:
            values = self._plan.values(name)
            setting[name] = params[name] if values is None else {as_text(v): v for v in values}[params[name]]
        return setting


def _changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two identities of a plan: `max_steps: 2, now 3`."""
    changes = []
    for part in wanted:
        old, new = stored.get(part), wanted[part]
        if old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            old, new = {part: old}, {part: new}
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                before, after = (as_text(one[name]) if name in one else "not set" for one in (old, new))
                changes.append(f"{name}: {before}, now {after}")
    return "; ".join(changes)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(NO_OPTUNA) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
