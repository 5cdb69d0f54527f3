from fractions import Fraction

import pytest

from prefopt.evaluation.judges.answers import AnswerJudge, final_number
from prefopt.evaluation.judges.base import Candidate
from prefopt.safety.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### 8 apples (4 + 4)", 8),
        ("It is #### 3\n#### 5\nThat was 9 lines.", 5),
        ("#### none, or 5?", 5),
        ("7 apples\n#### none", None),
        ("so 3 + 4 = 7.", 7),
        ("9*5=45", 45),
        ("5-3=2", 2),
        ("the sum is -3.5 m", Fraction(-7, 2)),
        ("= −12", -12),
        ("$1,000.50!", Fraction(2001, 2)),
        ("a share of 3/4.", Fraction(3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("**18**", 18),
        (r"\boxed{18}", 18),
        ("12,345,678", 12345678),
        ("1,2,3", 3),
        ("1/0", None),
        ("seven", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == number


def scores(judge, *completions, **columns):
    return [one.score for one in judge.score([Candidate("p", completion, columns) for completion in completions])]


def test_answers_are_compared_by_kind():
    assert scores(AnswerJudge("number"), "so 7", "#### 7.0", "8", "none", answer="3+4 = 7 #### 7") == [1, 1, 0, 0]
    assert scores(AnswerJudge("number", column="gold"), "1,000", answer="x", gold=1000) == [1]
    assert scores(AnswerJudge("exact"), " Paris\n", "paris", answer="Paris") == [1, 0]
    letter = AnswerJudge("regex", pattern=r"answer is \(?([A-D])\)?")
    assert scores(letter, "The answer is (B).", "answer is A, no: answer is B", "B", answer="B") == [1, 1, 0]
    assert scores(AnswerJudge("regex", pattern=r"\d+"), "it is 12", answer=12) == [1]


def test_what_an_answer_judge_cannot_use_is_said():
    with pytest.raises(UsageError, match=r"judge number needs the right answer in the column 'answer'.*has level"):
        scores(AnswerJudge("number"), "7", level=1)
    with pytest.raises(UsageError, match="'Paris' is not a number; use exact"):
        scores(AnswerJudge("number"), "7", answer="Paris")
    for kind, pattern, message in [("regex", "(", "regular"), ("regex", "", "pattern"), ("odd", "", "no answers")]:
        with pytest.raises(UsageError, match=message):
            AnswerJudge(kind, pattern=pattern)


def test_expressions_are_compared_by_math_verify():
    pytest.importorskip("math_verify")
    assert scores(AnswerJudge("math"), r"$\frac{2}{4}$", "$0.5$", "$0.6$", answer=r"$\frac{1}{2}$") == [1, 1, 0]
