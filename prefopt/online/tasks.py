"""The bundled tasks of rounds: prompts to train on, held-out prompts, a judge, and where samples end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefopt.demo.data import read_rows
from prefopt.demo.rule import follows_rule
from prefopt.evaluation.tasks import arithmetic
from prefopt.generation.samples import PromptRow

LEVELS = (1, 2, 3)
TRAIN, HELDOUT = 240, 100


@dataclass(frozen=True)
class Task:
    """A bundled task.

    Attributes:
        prompts: of a split, `train` or `heldout`.
        judge: what scores its samples.
        max_new_tokens, stop: where samples end.
        words: what it is, for the screen.
    """

    prompts: Callable[[str], list[PromptRow]]
    judge: str
    max_new_tokens: int
    stop: tuple[str, ...]
    words: str


def _arithmetic(split: str) -> list[PromptRow]:
    if split == "train":
        return arithmetic.problems("train", TRAIN, levels=LEVELS)
    return arithmetic.problems("heldout", HELDOUT, levels=LEVELS)


def _one_sentence(split: str) -> list[PromptRow]:
    prompts = [PromptRow(row["prompt"]) for row in read_rows("train" if split == "train" else "heldout")]
    return list({row.id: row for row in prompts}.values())


def one_sentence(completion: str) -> float:
    """1 if an answer follows the rule of the bundled pairs (one short sentence, no preamble), else 0."""
    return float(follows_rule(completion))


TASKS = {
    "arithmetic": Task(
        _arithmetic, "number", arithmetic.MAX_NEW_TOKENS, arithmetic.STOP, "arithmetic problems with known answers"
    ),
    "one_sentence": Task(
        _one_sentence, f"{__name__}:one_sentence", 48, (), "questions to be answered in one short sentence"
    ),
}
