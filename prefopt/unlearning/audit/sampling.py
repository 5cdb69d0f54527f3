"""Sampling: several answers at temperature 1; the best of them may say what the greedy one does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.generation.samples import PromptRow, SamplingSettings
from prefopt.generation.transformers import TransformersGenerator
from prefopt.safety.errors import UsageError
from prefopt.unlearning import metrics
from prefopt.unlearning.audit.attack import Values, powers_of_two
from prefopt.unlearning.data import Question, prompt_of
from prefopt.unlearning.measure import rouge_recall


@dataclass(frozen=True)
class Sampling:
    """Draw answers, and estimate the ROUGE-L recall of the best of 1, 2, 4, ... of them (`metrics.leak_at_k`).

    Attributes:
        asked: the forget set.
        samples: answers drawn to each question.
        seed: of the draws.
        max_new_tokens: of an answer.

    Reference: Reisizadeh et al. 2025, arXiv 2511.04934.
    """

    name: ClassVar[str] = "sampling"
    cheap: ClassVar[bool] = False

    asked: tuple[Question, ...]
    samples: int = 16
    seed: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"sampling needs at least one answer to each question, got {self.samples}")
        if not all(question.question for question in self.asked):
            raise UsageError("sampling needs questions, and the forget set holds plain texts")

    @property
    def title(self) -> str:
        return "Sampling: leak@k"

    @property
    def headline(self) -> str:
        return _best_of(self.samples)

    def shown(self, what: str, measure: str) -> bool:
        return True

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Values:
        prompts = [PromptRow(prompt_of(question.question, tokenizer)) for question in self.asked]
        settings = SamplingSettings(samples=self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed)
        drawn = TransformersGenerator(model, tokenizer, name="").sample(prompts, settings)
        answers = [sample.completion for of_prompt in drawn for sample in of_prompt]
        references = [question.answer for question in self.asked for _ in range(self.samples)]
        scores = np.array(rouge_recall(answers, references)).reshape(-1, self.samples)
        return {_best_of(k): {"rouge": metrics.leak_at_k(scores, k).tolist()} for k in powers_of_two(self.samples)}


def _best_of(k: int) -> str:
    return "one answer" if k == 1 else f"best of {k}"
