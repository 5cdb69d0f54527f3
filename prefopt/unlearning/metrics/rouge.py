"""How much of a reference answer a generated one contains."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.evaluation.arrays import Floats, text_list
from prefopt.safety.errors import UsageError
from prefopt.unlearning.metrics.extra import required

_ALONE = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Letters of scripts that do not separate words: Thai, Lao, Japanese, Chinese."""


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L of N answers.

    Attributes:
        recall: (N,) length of the longest common subsequence of words over the reference's; TOFU's.
        f1: (N,) harmonic mean of recall and precision; MUSE's.
    """

    recall: Floats
    f1: Floats


def rouge_l(answers: Sequence[str], references: Sequence[str], any_script: bool = False, stem: bool = True) -> RougeL:
    """ROUGE-L, by Google's rouge-score: for English.

    rouge-score reads the letters a to z and digits, and takes all others as spaces.

    Args:
        answers: N generated texts; one without words gets 0.
        references: N texts to compare them with.
        any_script: for other languages: words of letters of any script, unstemmed. In scripts that do not separate
            words each letter counts as one. Not comparable with published numbers.
        stem: whether Porter's stemmer takes the endings off words: TOFU does, MUSE does not.

    Raises:
        UsageError: for a reference without a word.
    """
    answers, references = text_list("answers", answers), text_list("references", references)
    if len(answers) != len(references) or not answers:
        raise UsageError(f"as many answers as references are needed, got {len(answers)} and {len(references)}")
    module = required("rouge_score.rouge_scorer", "rouge-score", "ROUGE")
    # With a tokenizer of its own it does not stem.
    scorer = module.RougeScorer(["rougeL"], use_stemmer=stem, tokenizer=AnyScript() if any_script else None)
    recall, f1 = [], []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if not any_script and not any(letter.isascii() and letter.isalnum() for letter in reference):
            raise UsageError(
                f"reference {row} ({reference[:40]!r}) has no word that ROUGE reads: rouge-score takes all but the "
                "letters a to z and digits as spaces. any_script=True reads other scripts too"
            )
        if not AnyScript().tokenize(reference):
            raise UsageError(f"reference {row} ({reference[:40]!r}) has no word")
        score = scorer.score(reference, answer)["rougeL"]
        recall.append(score.recall)
        f1.append(score.fmeasure)
    return RougeL(np.array(recall, dtype=np.float64), np.array(f1, dtype=np.float64))


class AnyScript:
    """A tokenizer as rouge-score takes it: words of any script, or letters where nothing separates words."""

    def tokenize(self, text: str) -> list[str]:
        letters = []
        for letter in unicodedata.normalize("NFKC", text).casefold():
            # Letters, marks (vowels of many scripts) and numbers.
            if unicodedata.category(letter)[0] not in "LMN":
                letters.append(" ")
            else:
                letters.append(f" {letter} " if _ALONE.match(letter) else letter)
        return "".join(letters).split()
