"""What a run's measurements say to its user."""

from __future__ import annotations

import pytest

from prefopt.unlearning.data import Question
from prefopt.unlearning.findings import findings_of
from prefopt.unlearning.measure import SetScores

ROWS = [Question(f"Where was author {number} born?", "She was born in a town by the sea") for number in range(20)]
QUESTIONS = {"forget": ROWS, "retain": ROWS}
TEXT = "She was born in a town by the sea"


def measured(forget: float, retain: float, ratio: float, text: str = TEXT, kept: str = TEXT) -> dict[str, SetScores]:
    """Probabilities, the truth ratio of the forget set, and the answers to both sets."""
    ratios = [ratio * (1 + number / 100) for number in range(20)]
    return {
        "forget": SetScores([forget] * 20, truth_ratio=ratios, answers=[text] * 20, extraction_strength=[0.1],
                            exact_memorization=[0.1]),
        "retain": SetScores([retain] * 20, answers=[kept] * 20),
    }  # fmt: skip


BEFORE, GOLD = measured(0.98, 0.98, 5.0), measured(0.3, 0.98, 0.8)


def told(after: dict[str, SetScores], gold: dict[str, SetScores] | None = GOLD) -> list[tuple[str, str]]:
    return [(finding.level, finding.rule) for finding in findings_of(BEFORE, after, gold, QUESTIONS, 40)]


def test_a_good_run_has_none():
    assert told(measured(0.3, 0.95, 0.8)) == []


@pytest.mark.parametrize(("kept", "level"), [(0.85, "warning"), (0.3, "serious")])
def test_what_was_to_be_kept_is_lost(kept, level):
    (finding,) = findings_of(BEFORE, measured(0.3, kept, 0.8), GOLD, QUESTIONS, 40)
    assert (finding.level, finding.rule, finding.step) == (level, "utility_lost", 40)
    assert f"fell from 0.98 to {kept}" in finding.text
    assert "retain=4" in finding.remedy


def test_the_gold_model_prefers_true_answers_less_or_more():
    assert told(BEFORE) == [("warning", "not_forgotten")]
    assert told(measured(0.0, 0.98, 0.2)) == [("warning", "forgot_too_much")]


def test_no_forget_quality():
    (finding,) = findings_of(BEFORE, measured(0.3, 0.98, 0.8), None, QUESTIONS, 40)
    assert (finding.level, finding.rule) == ("note", "no_forget_quality")
    assert "--learn true" in finding.remedy
    without = {"forget": SetScores([0.3] * 20, extraction_strength=[0.1], exact_memorization=[0.1]),
               "retain": SetScores([0.98] * 20)}  # fmt: skip
    (finding,) = findings_of(without, without, without, QUESTIONS, 40)
    assert "perturbed_answer" in finding.text


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ("born born born born born born born born", "in repeated sequences"),
        ("xqzj vvkw", "in combinations that the sets do not have"),
        ("", "a word"),
    ],
)
def test_answers_that_are_no_text(noise, words):
    (finding,) = findings_of(BEFORE, measured(0.3, 0.98, 0.8, text=noise), GOLD, QUESTIONS, 40)
    assert (finding.level, finding.rule) == ("warning", "degenerate")
    assert words in finding.text
    assert "the set to forget" in finding.text
    assert told(measured(0.3, 0.98, 0.8, kept=noise)) == [("serious", "degenerate")]
