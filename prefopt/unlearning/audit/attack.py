"""What an attack is, and the two numbers most of them take: probability and ROUGE-L recall of the true answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedTokenizerBase

from prefopt.unlearning.data import Question
from prefopt.unlearning.measure import SetScores, measure

Values = dict[str, dict[str, list[float]]]
"""One number a question, by what was done (`after 4 steps`) and by measure (`probability`, `rouge`)."""


class Attack(Protocol):
    """A way to get forgotten answers out of a model: a frozen dataclass, whose fields decide about the numbers.

    Attributes:
        name: on the command line and in files.
        title: in the table.
        cheap: whether the model before forgetting is attacked too, for comparison.
        headline: what was done, for the finding: the strongest form of the attack.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    cheap: ClassVar[bool]

    @property
    def title(self) -> str: ...

    @property
    def headline(self) -> str: ...

    def shown(self, what: str, measure: str) -> bool:
        """Whether the table has a row for it; the file has all."""
        ...

    def __call__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Values:
        """Attack a model, which may be changed."""
        ...


def plain(scores: SetScores) -> dict[str, list[float]]:
    """The two numbers of a set that was measured; ROUGE is missing for plain texts."""
    values = {"probability": scores.probability, "rouge": scores.rouge}
    return {measure: of for measure, of in values.items() if of}


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    max_length: int | None = None,
) -> dict[str, list[float]]:
    """The two numbers of a model as it is now; plain texts are cut into parts of `max_length` tokens."""
    bare = [replace(question, paraphrase="", wrong=()) for question in questions]
    # With one answer to a question there is nothing to share, and no layout to choose.
    measured = measure(
        model, tokenizer, {"forget": bare}, max_length=max_length, max_new_tokens=max_new_tokens, layout="padded",
        verbatim_tokens=0,
    )  # fmt: skip
    return plain(measured["forget"])


def powers_of_two(most: int) -> Iterator[int]:
    """1, 2, 4, ... below `most`, and `most` itself."""
    step = 1
    while step < most:
        yield step
        step *= 2
    yield most
