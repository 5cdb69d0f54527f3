"""The sets of an unlearning run: read, and checked before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState

from prefopt.recipe.arguments import Recipe
from prefopt.recipe.ready import hub_errors
from prefopt.recipe.unlearning.options import UnlearningArguments, options_of
from prefopt.safety.errors import UsageError, retold
from prefopt.trainer.saving.disk import check_writable
from prefopt.unlearning.continuations import CONTINUED_SETS, KNOWLEDGE_SETS
from prefopt.unlearning.data import (
    IDK,
    Question,
    UnlearningDataError,
    bundled_questions,
    check_apart,
    data_step,
    read_questions,
)
from prefopt.unlearning.metrics import few_shot_prompt
from prefopt.unlearning.metrics.extra import required
from prefopt.unlearning.trainer import check_rule


@dataclass(frozen=True)
class Sets:
    """The questions of a run.

    Attributes:
        forget, retain: to train on.
        measured: to measure with, by the name of the set.
        idk: answers in place of the true ones.
    """

    forget: list[Question]
    retain: list[Question]
    measured: dict[str, list[Question]]
    idk: tuple[str, ...] = IDK


def load_sets(recipe: Recipe) -> Sets:
    """The sets of a run, checked, and with them the options of its stages: learning may take hours before the others.

    Raises:
        UnlearningDataError: naming the set, the row and the column.
        UsageError: for an option that a later stage would refuse.
        HubUnreachable: if a set is not on this machine and the Hub does not answer.
    """
    _check_stages(recipe)
    with hub_errors(recipe):
        return read_sets(options_of(recipe), recipe.bundled_data)


def _check_stages(recipe: Recipe) -> None:
    script, objective, say = options_of(recipe), recipe.objective, partial(recipe.console.print, soft_wrap=True)
    check_rule(script.rule, script.evaluate_every, script.learn or script.gold_model_name_or_path is not None)
    if script.learn:
        for name in ("learn_epochs", "learn_learning_rate"):
            if not 0 < (value := getattr(script, name)) < math.inf:
                raise UsageError(f"--{name} must be above 0, got {value:g}")
    elif script.learn_epochs != UnlearningArguments.learn_epochs:
        say("--learn_epochs has no effect without --learn true")
    if script.idk_answers is not None and objective is not None and data_step(objective) == "answers":
        say(f"--idk_answers has no effect: {objective} trains on the true answers")
    if not script.dry_run and PartialState().is_main_process:
        check_writable(Path(script.models_dir), "models_dir")


def read_sets(script: UnlearningArguments, bundled: bool) -> Sets:
    """The sets that options name, checked, or the bundled ones.

    Raises:
        UnlearningDataError: naming the set, the row and the column.
    """
    if script.measured_rows < 2:
        raise UnlearningDataError(f"--measured_rows is {script.measured_rows}; intervals need two rows or more")
    if not 0 <= script.evaluate_every < math.inf:
        raise UnlearningDataError(f"--evaluate_every is {script.evaluate_every}; it must be 0 or more epochs")
    for module, package in (("scipy", "scipy"), ("sklearn", "scikit-learn"), ("rouge_score", "rouge-score")):
        required(module, package, "measuring what was forgotten")
    if bundled:
        questions = bundled_questions()
        return Sets(questions["forget"], questions["retain"], _first(questions, script.measured_rows), _idk(script))
    if script.retain_set is None:
        raise UnlearningDataError("--forget_set needs a --retain_set: what the model should keep")
    forget, retain = read_questions(str(script.forget_set)), read_questions(script.retain_set)
    check_apart(forget, retain)
    measured = {"forget": forget, "retain": retain}
    for name in ("forget", "retain", "real_authors", "world_facts", "holdout"):
        option = f"{name}_eval_set" if name in measured else f"{name}_set"
        if (source := getattr(script, option)) is not None:
            measured[name] = read_questions(source)
            if name != "holdout":
                _check_measurable(f"--{option} {source}", measured[name])
    for name, rows in measured.items():
        # A text is cut into several parts.
        if len(rows) < 2 and all(row.question for row in rows):
            raise UnlearningDataError(f"the set {name} to measure has {len(rows)} row; intervals need two or more")
    measured |= _continued(script)
    return Sets(forget, retain, _first(measured, script.measured_rows), _idk(script))


def _continued(script: UnlearningArguments) -> dict[str, list[Question]]:
    """The sets whose questions are prompts to continue; those about knowledge have their examples before them."""
    if script.verbatim_tokens < 0:
        raise UnlearningDataError(f"--verbatim_tokens is {script.verbatim_tokens}; 0 leaves continuations out")
    sets: dict[str, list[Question]] = {}
    for name in CONTINUED_SETS:
        source, shown = getattr(script, f"{name}_set"), name.replace("knowledge", "examples")
        examples = getattr(script, f"{shown}_set") if name in KNOWLEDGE_SETS else None
        if source is None:
            if examples is not None:
                raise UnlearningDataError(
                    f"--{shown}_set holds examples before the questions of --{name}_set: name it"
                )
            continue
        rows = _asked(f"--{name}_set {source}", source)
        if name in KNOWLEDGE_SETS:
            before = [] if examples is None else _asked(f"--{shown}_set {examples}", examples)
            pairs = [(example.question, example.answer) for example in before]
            rows = [replace(row, question=few_shot_prompt(row.question, pairs)) for row in rows]
        sets[name] = rows
    return sets


def _asked(option: str, source: str) -> list[Question]:
    rows = read_questions(source)
    if not rows or not all(row.question for row in rows):
        raise UnlearningDataError(f"{option}: each row needs a question (or a prompt) and its answer (or gt)")
    return rows


def _check_measurable(name: str, questions: list[Question]) -> None:
    lacking = next((number for number, question in enumerate(questions) if not question.wrong), None)
    if lacking is not None:
        raise UnlearningDataError(
            f"{name}: row {lacking} (from 0) has no perturbed_answer, so its truth ratio cannot be computed. Add "
            "wrong answers, or leave the option out to measure without truth ratios"
        )


def _first(measured: Mapping[str, list[Question]], rows: int) -> dict[str, list[Question]]:
    return {name: questions[:rows] for name, questions in measured.items()}


def _idk(script: UnlearningArguments) -> tuple[str, ...]:
    if script.idk_answers is None:
        return IDK
    with retold(UnlearningDataError, f"--idk_answers {script.idk_answers} cannot be read"):
        lines = Path(script.idk_answers).read_text(encoding="utf-8").splitlines()
    answers = tuple(line.strip() for line in lines if line.strip())
    if not answers:
        raise UnlearningDataError(f"--idk_answers {script.idk_answers} has no lines")
    return answers
