"""Tasks of lm-eval, EleutherAI's evaluation harness, for a model in memory; an extra that is imported here alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.safety.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class TaskResult:
    """One number of a task.

    Attributes:
        task: lm-eval's name of the task or group.
        metric: such as `acc`, with the filter behind a comma if there is one: `exact_match,strict-match`.
        value: of the metric.
        standard_error: lm-eval's; None where it gives none.
        examples: that were used; None for a group.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, from `find_tasks`.

    Attributes:
        names: of tasks, groups or tags.
        manager: lm-eval's `TaskManager`.
    """

    names: Sequence[str]
    manager: Any


def find_tasks(tasks: Sequence[str], folder: Path | None = None) -> Tasks:
    """Look tasks up, before a model is loaded; lm-eval needs half a minute to list its own.

    Args:
        tasks: lm-eval's names of tasks, groups or tags.
        folder: with YAML files of your own tasks, instead of lm-eval's; lm-eval imports functions that they name.

    Raises:
        UsageError: if lm-eval is not installed, or has no such task.
    """
    manager = _imported("lm_eval.tasks").TaskManager(
        include_path=None if folder is None else str(folder), include_defaults=folder is None
    )
    for task in tasks:
        if task not in manager.all_tasks:
            where = "lm-eval has" if folder is None else f"the YAML files of {folder} have"
            raise UsageError(f"{where} no task {task!r}.{did_you_mean(task, manager.all_tasks)}")
    return Tasks(tasks, manager)


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, *, limit: int | None = None, batch_size: int = 8, seed: int = 0
) -> list[TaskResult]:
    """The numbers that lm-eval gives for a model, with each task's own few-shot examples and no chat template.

    Args:
        model: a causal model on its device.
        tokenizer: of the model.
        tasks: to run.
        limit: so many examples of each task; all if left out.
        batch_size: rows at once.
        seed: of all that lm-eval draws.
    """
    harness, networks = _imported("lm_eval"), _imported("lm_eval.models.huggingface")
    network = networks.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    results = harness.simple_evaluate(
        model=network, tasks=list(tasks.names), limit=limit, task_manager=tasks.manager, log_samples=False, **seeds
    )
    return _read(results)


def _read(results: Any) -> list[TaskResult]:
    """Of `acc,none` and `acc_stderr,none` beside one another, one number."""
    numbers = []
    for task, values in results["results"].items():
        examples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            label = metric if name == "none" else key
            shown = float(error) if isinstance(error, (int, float)) else None
            numbers.append(TaskResult(task, label, float(value), shown, examples))
    return numbers


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"tasks of lm-eval need lm-eval ({error}): pip install 'prefopt-trainer[lm-eval]'") from error
