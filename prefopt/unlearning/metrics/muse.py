"""MUSE's measures of what a model still says: the continuation of a text, and answers after examples.

Shi et al. 2024, arXiv 2407.06460, as their code has them: ROUGE-L F1 without a stemmer, of greedy completions.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.evaluation.arrays import Floats
from prefopt.unlearning.metrics.rouge import rouge_l

VERBATIM_TOKENS = 128
"""Tokens of a continuation, and of the text that it is compared with."""
KNOWLEDGE_TOKENS = 32
"""Tokens of an answer after examples."""


def verbatim_memorization(continuations: Sequence[str], texts: Sequence[str], any_script: bool = False) -> Floats:
    """(N,) VerbMem: how much of a text a model continues word by word, 0 to 1.

    Args:
        continuations: N greedy continuations of the beginnings of texts, at most `VERBATIM_TOKENS` long.
        texts: N true continuations of the same length in tokens.
        any_script: as for `rouge_l`.

    Raises:
        UsageError: for a text without a word.
    """
    return rouge_l(continuations, texts, any_script, stem=False).f1


def knowledge_memorization(completions: Sequence[str], answers: Sequence[str], any_script: bool = False) -> Floats:
    """(N,) KnowMem: how well questions are answered after examples, 0 to 1.

    Args:
        completions: N greedy completions of `few_shot_prompt`, at most `KNOWLEDGE_TOKENS` long.
        answers: N true answers.
        any_script: as for `rouge_l`.

    Raises:
        UsageError: for an answer without a word.
    """
    return rouge_l([first_answer(text) for text in completions], answers, any_script, stem=False).f1


def few_shot_prompt(question: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """A question after others with their answers, for a model to continue; no chat template is applied.

    Args:
        question: to be answered.
        examples: questions and answers, MUSE's `*_qa_icl`.
    """
    shown = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in examples)
    return f"{shown}Question: {question}\nAnswer: "


def first_answer(completion: str) -> str:
    """A completion up to where the model asks the next question itself."""
    for end in ("\n\n", "\nQuestion", "Question:"):
        completion = completion.split(end)[0]
    return completion
