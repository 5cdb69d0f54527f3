"""Relearning: a few optimizer steps on a part of the forget set, measured on the rest of it.

The gold model gets the same steps. What it gains comes from the part itself (the form of the answers, shared facts);
only what the unlearned model gains beyond that was never forgotten.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase, TrainerCallback

from prefopt.safety.errors import UsageError
from prefopt.trainer import PreferenceConfig, PreferenceTrainer
from prefopt.unlearning.audit.attack import Values, ask, powers_of_two
from prefopt.unlearning.data import Question, learn_rows
from prefopt.unlearning.learn import OBJECTIVE


@dataclass(frozen=True)
class Relearning:
    """Train on a few forgotten answers, and ask for the others.

    Attributes:
        learned: trained on.
        asked: measured, after 1, 2, 4, ... steps; shares no question with `learned`.
        steps: optimizer steps (AdamW, constant learning rate).
        learning_rate: of the steps.
        batch_size: rows of a step.
        seed: of the order.
        max_new_tokens: of the greedy answers.
        max_length: plain texts are cut into parts of this many tokens.

    Reference: Hu et al. 2024, arXiv 2406.13356 (relearning on a part of the forget set).
    """

    name: ClassVar[str] = "relearning"
    cheap: ClassVar[bool] = False

    learned: tuple[Question, ...]
    asked: tuple[Question, ...]
    steps: int = 8
    learning_rate: float = 1e-5
    batch_size: int = 8
    seed: int = 0
    max_new_tokens: int = 64
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"relearning needs at least one step, got {self.steps}")

    @property
    def title(self) -> str:
        return f"Relearning {len(self.learned)} of {len(self.learned) + len(self.asked)} rows"

    @property
    def headline(self) -> str:
        return _after(self.steps)

    def shown(self, what: str, measure: str) -> bool:
        return what != _after(0) and (measure == "probability" or what == _after(self.steps))

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Values:
        values = {_after(0): ask(model, tokenizer, self.asked, self.max_new_tokens, self.max_length)}
        points = set(powers_of_two(self.steps))

        def measure_at(step: int) -> None:
            if step in points:
                values[_after(step)] = ask(model, tokenizer, self.asked, self.max_new_tokens, self.max_length)

        with tempfile.TemporaryDirectory() as folder:
            trainer = PreferenceTrainer(
                model,
                args=self._arguments(folder),
                train_dataset=learn_rows(self.learned, tokenizer, self.max_length),
                processing_class=tokenizer,
                callbacks=[_EveryStep(measure_at)],
            )
            trainer.train()
        return values

    def _arguments(self, folder: str) -> PreferenceConfig:
        return PreferenceConfig(
            output_dir=folder, loss=OBJECTIVE, max_steps=self.steps, learning_rate=self.learning_rate,
            per_device_train_batch_size=min(self.batch_size, len(self.learned)), lr_scheduler_type="constant",
            seed=self.seed, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            max_length=self.max_length, gradient_checkpointing=False, bf16=False,
            dataloader_pin_memory=False,
        )  # fmt: skip


def split_rows(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Rows to learn and rows to ask, drawn at random; both in their order.

    Raises:
        UsageError: if one of the two would have too few rows: one to learn, two to ask.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share of the forget set to relearn must be in (0, 1), got {share}")
    count = max(1, round(share * len(questions)))
    if len(questions) - count < 2:
        raise UsageError(f"{len(questions)} forgotten rows are too few to relearn {count} and to ask the others")
    chosen = set(random.Random(seed).sample(range(len(questions)), count))
    learned, asked = ([q for n, q in enumerate(questions) if (n in chosen) is part] for part in (True, False))
    return tuple(learned), tuple(asked)


def _after(step: int) -> str:
    return f"after {step} step{'' if step == 1 else 's'}"


class _EveryStep(TrainerCallback):  # type: ignore[misc]
    def __init__(self, measure_at: Callable[[int], None]) -> None:
        self._measure_at = measure_at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure_at(state.global_step)
