"""`hyperparameter_search` of a trainer: a new trainer per trial, with optuna.

transformers' own search changes the model and the arguments of one trainer, and overwrites its attribute `objective`,
which is the loss here. So nothing of it is used but its search spaces and its result.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import BestRun, default_hp_space_optuna

from prefopt.safety.errors import UsageError, did_you_mean

ACCURACY = "eval_rewards/accuracies"


def search(
    make: Callable[[Any], Any],
    args: Any,
    hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
    compute_objective: Callable[[dict[str, float]], Any] | None = None,
    n_trials: int = 20,
    direction: str | Sequence[str] | None = None,
    backend: Any = None,
    hp_name: Callable[[Any], str] | None = None,
    **study: Any,
) -> Any:
    """Train with many settings, each from the start, and return the best; takes what transformers' method takes.

    Args:
        make: a trainer from training arguments.
        args: that all trials share.
        hp_space: from an optuna trial to training arguments, `loss` among them; default: transformers'.
        compute_objective: from the metrics of the evaluation to what is optimized; default: the held-out accuracy.
        n_trials: how many.
        direction: `minimize` or `maximize`, or one for each of several objectives; default: maximize the accuracy.
        backend: `optuna`, the only one.
        hp_name: the folder of a trial in `args.output_dir`; default: `run-0`, `run-1`, ...
        study: arguments of `optuna.create_study`, and `timeout` and `catch` of `optimize`.

    Returns:
        transformers' `BestRun`; a list of those on the front with several directions.

    Raises:
        UsageError: for another backend, a name that is no training argument, a missing direction or optuna.
    """
    if backend is not None and str(getattr(backend, "value", backend)) != "optuna":
        raise UsageError(f"hyperparameter_search works with backend='optuna' here, got {backend!r}")
    if compute_objective is None:
        if direction not in (None, "maximize"):
            raise UsageError(
                "hyperparameter_search optimizes the held-out accuracy, which is to be maximized: a loss's own value "
                "changes with its hyperparameters. For another measure pass compute_objective and direction"
            )
        direction = "maximize"
    elif direction is None:
        raise UsageError("hyperparameter_search: pass direction='minimize' or 'maximize' with compute_objective")
    space, objective = hp_space or default_hp_space_optuna, compute_objective or _accuracy

    def run(trial: Any) -> Any:
        name = f"run-{trial.number}" if hp_name is None else hp_name(trial)
        trainer = make(_with(args, {**space(trial), "output_dir": str(Path(args.output_dir) / name)}))
        if trainer.eval_dataset is None:
            raise UsageError(
                "hyperparameter_search compares trials on held-out rows: give the trainer an eval_dataset"
            )
        trainer.train()
        value = objective(trainer.evaluate())
        del trainer
        gc.collect()
        return value

    optimize = {name: study.pop(name) for name in ("timeout", "catch") if name in study}
    way = {"direction": direction} if isinstance(direction, str) else {"directions": list(direction or ())}
    made = _optuna().create_study(**way, **study)
    made.optimize(run, n_trials=n_trials, **optimize)
    if isinstance(direction, str):
        return BestRun(str(made.best_trial.number), made.best_trial.value, made.best_trial.params)
    return [BestRun(str(best.number), best.values, best.params) for best in made.best_trials]


def _with(args: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the arguments with other values, in the types of the old ones."""
    changed = copy.copy(args)
    for name, value in values.items():
        if not hasattr(args, name):
            near = did_you_mean(name, vars(args))
            raise UsageError(f"hyperparameter_search: {name} is not an argument of {type(args).__name__}.{near}")
        old = getattr(args, name)
        setattr(changed, name, type(old)(value) if isinstance(old, (int, float)) else value)
    return changed


def _accuracy(metrics: dict[str, float]) -> float:
    if ACCURACY not in metrics:
        raise UsageError(
            f"hyperparameter_search: the evaluation has no {ACCURACY}, as this loss has no rewards: pass "
            "compute_objective and direction"
        )
    return metrics[ACCURACY]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            'hyperparameter_search needs optuna, which is not installed: pip install "prefopt-trainer[sweep]"'
        ) from error
    return optuna
