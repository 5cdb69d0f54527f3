"""`--eval_answers`: the same held-out prompts answered at every evaluation, for the run's page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from prefopt.data.encodings import text_tokenizer
from prefopt.demo.data import heldout_prompts
from prefopt.generation.answers import Answer, Prompt, continued
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.pages import save_answers
from prefopt.report.folder import ANSWERS
from prefopt.trainer import PreferenceTrainer

TOKENS = 64
"""Of an answer, at most."""


def answer_at_evaluations(recipe: Recipe, trainer: PreferenceTrainer, resumed: bool) -> bool:
    """Add the callback, if it is asked for and the held-out prompts are token ids; returns whether it was added."""
    count, rows = recipe.script.eval_answers, trainer.eval_dataset
    if not count:
        return False
    if not isinstance(rows, Dataset) or "prompt_ids" not in rows.column_names:
        recipe.console.print("--eval_answers has no effect: it needs one held-out set of texts, no stream.")
        return False
    trainer.add_callback(EvalAnswers(recipe, trainer, rows.select(range(min(count, len(rows)))), resumed))
    return True


class EvalAnswers(TrainerCallback):  # type: ignore[misc]
    """Answers held-out prompts greedily at every evaluation, and stores the answers in `answers.json`.

    Args:
        recipe: of the run.
        trainer: its trainer; the model must be whole on this process.
        rows: with `prompt_ids`.
        resumed: whether the answers of an earlier part of the run are in its folder.
    """

    def __init__(self, recipe: Recipe, trainer: PreferenceTrainer, rows: Dataset, resumed: bool):
        self._recipe, self._trainer = recipe, trainer
        self._ids = [list(row["prompt_ids"]) for row in rows]
        self._prompts = _shown(recipe, self._ids, trainer)
        self._answers = _stored(Path(recipe.training.output_dir) / ANSWERS) if resumed else {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        answers = continued(model, trainer.processing_class, self._ids, TOKENS)
        self._answers[state.global_step] = [answer.stripped() for answer in answers]
        save_answers(self._recipe, self._prompts, self._answers)


def _shown(recipe: Recipe, ids: list[list[int]], trainer: PreferenceTrainer) -> Sequence[Prompt]:
    """The prompts as people read them: of data that is not bundled, with the words of the chat template."""
    if recipe.bundled_data and len(trainer.eval_dataset) == len(bundled := heldout_prompts()):
        return bundled[: len(ids)]
    tokenizer = text_tokenizer(trainer.processing_class)
    return [tokenizer.decode(prompt, skip_special_tokens=True).strip() for prompt in ids]


def _stored(file: Path) -> dict[int, Sequence[Answer]]:
    """The answers of a run that is resumed."""
    if not file.is_file():
        return {}
    rounds = json.loads(file.read_text(encoding="utf-8"))["answers"]
    return {one["step"]: [Answer(*pair) for pair in zip(one["texts"], one["ended"], strict=True)] for one in rounds}
