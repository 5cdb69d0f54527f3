"""What a model continues as it stands, without a chat template: beginnings of texts, and questions after examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.generation.answers import continued
from prefopt.generation.prompts import prompt_ids
from prefopt.generation.samples import PromptRow
from prefopt.safety.errors import UsageError
from prefopt.scoring.model import positions_of
from prefopt.unlearning import metrics
from prefopt.unlearning.data import Question
from prefopt.unlearning.metrics.muse import KNOWLEDGE_TOKENS, VERBATIM_TOKENS
from prefopt.unlearning.metrics.rouge import AnyScript

KNOWLEDGE_SETS = ("forget_knowledge", "retain_knowledge")
CONTINUED_SETS = ("verbatim", *KNOWLEDGE_SETS)
"""Sets whose questions are prompts to continue; their answers are what a model that knows them says."""


@dataclass(frozen=True)
class Beginning:
    """A prompt in token ids, and how it goes on."""

    prompt: list[int]
    reference: str


def beginnings(
    name: str, rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase, prompt_tokens: int
) -> list[Beginning]:
    """The prompts of a set.

    Args:
        name: one of `CONTINUED_SETS`, or of a set of plain texts.
        rows: of the set.
        tokenizer: of the model.
        prompt_tokens: how much of a plain text is the prompt: this many tokens, or the first half if that is less.
    """
    if name in KNOWLEDGE_SETS:
        return [Beginning(prompt_ids(PromptRow(row.question), tokenizer), row.answer) for row in rows]
    parts: list[Beginning] = []
    for row in rows:
        if row.question:
            prompt = prompt_ids(PromptRow(row.question), tokenizer)
            rest = list(tokenizer(row.answer, add_special_tokens=False)["input_ids"])
        else:
            ids = list(tokenizer(row.answer)["input_ids"])
            cut = max(1, min(prompt_tokens, len(ids) // 2))
            prompt, rest = ids[:cut], ids[cut:]
        parts.append(Beginning(prompt, tokenizer.decode(rest[:VERBATIM_TOKENS], skip_special_tokens=True)))
    return parts


def continuations(model: Any, tokenizer: PreTrainedTokenizerBase, name: str, parts: Sequence[Beginning]) -> list[str]:
    """How the model goes on greedily, in order.

    Raises:
        UsageError: naming the row whose prompt is too long for the model.
    """
    most = KNOWLEDGE_TOKENS if name in KNOWLEDGE_SETS else VERBATIM_TOKENS
    positions = positions_of(model)
    for row, part in enumerate(parts):
        if positions is not None and len(part.prompt) + most > positions:
            raise UsageError(
                f"{name} set, row {row} (from 0): its prompt has {len(part.prompt)} tokens, and {most} more are to "
                f"follow, but the model has {positions} positions. Shorten it, or take fewer examples or a smaller "
                "--verbatim_tokens"
            )
    return [answer.text for answer in continued(model, tokenizer, [part.prompt for part in parts], most)]


def scored(name: str, texts: Sequence[str], parts: Sequence[Beginning]) -> list[float]:
    """ROUGE-L F1 of each continuation; rows whose reference has no word are left out."""
    read = AnyScript().tokenize
    pairs = [(text, part.reference) for text, part in zip(texts, parts, strict=True) if read(part.reference)]
    if not pairs:
        return []
    said, references = zip(*pairs, strict=True)
    # Published numbers are of English, which needs no more than ASCII.
    other_script = not all(any(map(str.isascii, filter(str.isalnum, text))) for text in references)
    f1 = metrics.knowledge_memorization if name in KNOWLEDGE_SETS else metrics.verbatim_memorization
    values: list[float] = f1(said, references, other_script).tolist()
    return values
