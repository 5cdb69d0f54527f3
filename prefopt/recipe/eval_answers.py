"""`--eval_answers`: the same held-out prompts answered at every evaluation, with an estimate of KL."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from prefopt.data.encodings import text_tokenizer
from prefopt.demo.data import heldout_prompts
from prefopt.evaluation.kl import has_reference, kl_of_samples
from prefopt.generation.answers import Answer, Prompt, continued
from prefopt.generation.processes import on_main
from prefopt.recipe.arguments import Recipe
from prefopt.recipe.pages import save_answers
from prefopt.report.folder import ANSWERS
from prefopt.trainer import PreferenceTrainer

TOKENS = 64
"""Of an answer, at most."""
KL = "eval_kl"


def answer_at_evaluations(recipe: Recipe, trainer: PreferenceTrainer, resumed: bool, start: Any = None) -> bool:
    """Add the callback, if it is asked for and the held-out prompts are token ids; returns whether it was added.

    Args:
        recipe: of the run.
        trainer: not trained yet.
        resumed: whether an earlier part of the run has answered.
        start: the model before training, if it is at hand.
    """
    count, rows = recipe.script.eval_answers, trainer.eval_dataset
    if not count:
        return False
    if not isinstance(rows, Dataset) or "prompt_ids" not in rows.column_names:
        recipe.console.print("--eval_answers has no effect: it needs one held-out set of texts, no stream.")
        return False
    reference = trainer.ref_model if start is None else start
    if not has_reference(trainer.model, reference):
        recipe.console.print("No KL is estimated on answers: this run has no reference in memory.", soft_wrap=True)
    trainer.add_callback(EvalAnswers(recipe, trainer, rows.select(range(min(count, len(rows)))), resumed, reference))
    return True


class EvalAnswers(TrainerCallback):  # type: ignore[misc]
    """Answers held-out prompts at every evaluation: greedily for `answers.json`, and by a draw for `eval_kl`.

    Args:
        recipe: of the run.
        trainer: its trainer; the model must be whole on this process.
        rows: with `prompt_ids`.
        resumed: whether the answers of an earlier part of the run are in its folder.
        reference: that KL is from; None for an adapter's own model, or where there is nothing to compare with.

    Attributes:
        kl: of each prompt at the last evaluation, in nats; empty without a reference.
    """

    def __init__(self, recipe: Recipe, trainer: PreferenceTrainer, rows: Dataset, resumed: bool, reference: Any):
        self._recipe, self._trainer, self._reference = recipe, trainer, reference
        self.kl: list[float] = []
        self._ids = [list(row["prompt_ids"]) for row in rows]
        self._prompts = _shown(recipe, self._ids, trainer)
        self._answers = _stored(Path(recipe.training.output_dir) / ANSWERS) if resumed else {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.kl = on_main(partial(self._answer, state.global_step))
        if self.kl:  # on every process, as all decide whether this model is the best so far
            mean = {KL: sum(self.kl) / len(self.kl)}
            metrics |= mean
            # Not trainer.log, which would end the running means of the next log line.
            Trainer.log(self._trainer, mean)

    def _answer(self, step: int) -> list[float]:
        """Store the answers of a step. Returns the KL of each prompt; an empty list without a reference."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        answers = continued(model, trainer.processing_class, self._ids, TOKENS)
        self._answers[step] = [answer.stripped() for answer in answers]
        save_answers(self._recipe, self._prompts, self._answers)
        return self._kl(model) if has_reference(model, self._reference) else []

    def _kl(self, model: Any) -> list[float]:
        reference = None if self._reference is None else self._trainer.accelerator.unwrap_model(self._reference)
        with _on_device(reference, model.device), self._trainer.accelerator.autocast():
            return kl_of_samples(model, reference, self._trainer.processing_class, self._ids, TOKENS)


@contextlib.contextmanager
def _on_device(model: Any, device: Any) -> Iterator[None]:
    """Context in which a model is on a device, as that of a sweep waits on the CPU."""
    before = None if model is None else model.device
    if before in (None, device):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def last_kl(trainer: PreferenceTrainer) -> list[float]:
    """KL of each prompt at the last evaluation of a run with `--eval_answers`; empty without one or a reference."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback.kl for callback in callbacks if isinstance(callback, EvalAnswers)), [])


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
