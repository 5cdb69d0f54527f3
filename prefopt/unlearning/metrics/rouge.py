"""How much of a reference answer a generated one contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.safety.errors import UsageError
from prefopt.unlearning.metrics.arrays import Floats, required


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L of N answers.

    Attributes:
        recall: (N,) length of the longest common subsequence of words over the reference's; TOFU's.
        f1: (N,) harmonic mean of recall and precision; MUSE's.
    """

    recall: Floats
    f1: Floats


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> RougeL:
    """ROUGE-L with Porter's stemmer, by Google's rouge-score.

    rouge-score reads the letters a to z and digits only, so answers in other scripts cannot be compared with it.

    Args:
        answers: N generated texts; one without words gets 0.
        references: N texts to compare them with.

    Raises:
        UsageError: for a reference without a word that rouge-score reads.
    """
    if len(answers) != len(references) or not answers:
        raise UsageError(f"as many answers as references are needed, got {len(answers)} and {len(references)}")
    scorer = required("rouge_score.rouge_scorer", "rouge-score", "ROUGE").RougeScorer(["rougeL"], use_stemmer=True)
    recall, f1 = [], []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if not any(letter.isascii() and letter.isalnum() for letter in reference):
            raise UsageError(
                f"reference {row} ({reference[:40]!r}) has no word that ROUGE reads: rouge-score ignores all but the "
                "letters a to z and digits"
            )
        score = scorer.score(reference, answer)["rougeL"]
        recall.append(score.recall)
        f1.append(score.fmeasure)
    return RougeL(np.array(recall), np.array(f1))
