"""What a run's measurements say to its user: what was lost, what was not forgotten, what cannot be known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prefopt.analysis.health.finding import LEVELS, Finding
from prefopt.unlearning import metrics
from prefopt.unlearning.data import Question
from prefopt.unlearning.measure import Measured, numbers

LOST, HALF_LOST = 0.1, 0.5
"""Share of the utility that a run may lose before it is told, and before the finding is serious."""
WORSE = 0.1
"""How much more repetition or gibberish than before makes answers degenerate, as a share of their words or letters."""
PASSED = 0.05
"""A forget quality above it passes."""

_RETAIN = "a larger weight of the retain term (--loss 'npo_rt(beta=0.1, retain=4)'), a lower --learning_rate"
_EARLIER = ", and an earlier model by --best quality_and_utility"


def findings_of(
    before: Measured, after: Measured, gold: Measured | None, questions: Mapping[str, Sequence[Question]], step: int
) -> list[Finding]:
    """The problems of a finished run, the most serious first; empty if there are none.

    Args:
        before: of the model that was to forget.
        after: of the result.
        gold: of the gold model; None without one.
        questions: what was measured, by the name of the set.
        step: of the result.
    """
    found = [
        _lost(numbers(before), numbers(after), gold is not None, step),
        _degenerate(before, after, questions, step),
        _quality(after, gold, step),
    ]
    present = [finding for finding in found if finding is not None]
    return sorted(present, key=lambda finding: LEVELS.index(finding.level))


def _lost(before: Mapping[str, float], after: Mapping[str, float], gold: bool, step: int) -> Finding | None:
    """The utility fell, or, where the sets allow none, the probability of the answers to keep."""
    words = {"model_utility": "the model utility", "retain_probability": "the probability of the answers to keep"}
    name = "model_utility" if "model_utility" in before else "retain_probability"
    lost = 1 - after[name] / before[name] if before[name] else 0.0
    if lost <= LOST:
        return None
    text = f"{words[name]} fell from {before[name]:.2g} to {after[name]:.2g}: the run lost what it was to keep"
    level = "serious" if lost > HALF_LOST else "warning"
    return Finding("utility_lost", level, step, text, _RETAIN + (_EARLIER if gold else ""))


def _degenerate(
    before: Measured, after: Measured, questions: Mapping[str, Sequence[Question]], step: int
) -> Finding | None:
    """Answers repeat themselves, are no words, or are empty, where they did not before."""
    known = [text for rows in questions.values() for row in rows for text in (row.question, row.answer)]
    for name, level in (("retain", "serious"), ("forget", "warning")):
        if not (before[name].answers and after[name].answers):
            continue
        was, now = (metrics.degeneration(of[name].answers, known) for of in (before, after))
        shares = {
            "words in repeated sequences": (was.repetition.mean(), now.repetition.mean()),
            "letters in combinations that the sets do not have": (was.gibberish.mean(), now.gibberish.mean()),
            "answers without a word": (was.empty.mean(), now.empty.mean()),
        }
        worse = [f"{new:.0%} {what}, {old:.0%} before" for what, (old, new) in shares.items() if new - old > WORSE]
        if worse:
            answers = "to keep" if name == "retain" else "to forget"
            text = f"answers about the set {answers} are broken or off the subject: {'; '.join(worse)}"
            return Finding("degenerate", level, step, text, f"{_RETAIN}, fewer steps")
    return None


def _quality(after: Measured, gold: Measured | None, step: int) -> Finding | None:
    """There is no forget quality, or it says that the model can be told from the gold model."""
    if gold is None:
        text = "there is no gold model, so no forget quality: how a model answers that never saw the set is unknown"
        remedy = "--learn true, which makes one, or --gold_model_name_or_path"
        return Finding("no_forget_quality", "note", step, text, remedy)
    ratios, of_gold = after["forget"].truth_ratio, gold["forget"].truth_ratio
    if not ratios:
        text = "the forget set has no wrong answers (perturbed_answer), so there is no forget quality"
        remedy = "--forget_eval_set with wrong answers; prefopt unlearn prepare writes them from documents"
        return Finding("no_forget_quality", "note", step, text, remedy)
    p = metrics.forget_quality(ratios, of_gold).p
    if p > PASSED:
        return None
    told = f"its truth ratios can be told from the gold model's (p = {p:.2g}): it prefers true answers to wrong ones"
    if np.median(ratios) > np.median(of_gold):
        text, remedy = f"{told} more than the gold model does", "more steps, or a higher --learning_rate"
        return Finding("not_forgotten", "warning", step, text, remedy)
    text, remedy = f"{told} less than the gold model does", "fewer steps, a lower --learning_rate, a larger beta"
    return Finding("forgot_too_much", "warning", step, text, remedy)
