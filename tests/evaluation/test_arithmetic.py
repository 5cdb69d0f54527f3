import re

import pytest

from prefopt.evaluation.judges.answers import AnswerJudge
from prefopt.evaluation.judges.base import Candidate
from prefopt.evaluation.tasks import arithmetic
from prefopt.evaluation.tasks.arithmetic import LEVELS, problems
from prefopt.safety.errors import UsageError

NUMBER = re.compile(r"\d+")


def question(row):
    return row.prompt.rpartition("Q: ")[2]


def test_problems_are_the_same_each_time():
    first = problems("train", 20, levels=LEVELS)
    assert problems("train", 20, levels=LEVELS) == first
    assert problems("train", 30, levels=LEVELS)[:20] == first
    assert problems("train", 20, levels=LEVELS, seed=1) != first
    assert len({row.id for row in first}) == 20
    assert [row.columns["level"] for row in first] == [1, 2, 3, 4, 5] * 4


@pytest.mark.parametrize("level", LEVELS)
def test_no_calculation_is_in_both_splits(level):
    def calculations(split, seed):
        rows = problems(split, 300, levels=[level], seed=seed)
        return {
            (*re.findall(r"[-+*]", row.columns["solution"]), *sorted(NUMBER.findall(question(row)))) for row in rows
        }

    train = calculations("train", 0) | calculations("train", 1)
    heldout = calculations("heldout", 0) | calculations("heldout", 7)
    assert heldout
    assert train.isdisjoint(heldout)


@pytest.mark.parametrize("level", LEVELS)
def test_the_solution_is_right_and_the_judge_agrees(level):
    for row in problems("heldout", 50, levels=[level]):
        for left, operation, right, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", row.columns["solution"]):
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert value[operation] == int(result) > 0
        used = NUMBER.findall(row.columns["solution"].split("=")[0])
        assert used == NUMBER.findall(question(row))[:2]
        assert result == row.columns["answer"]
        completions = [row.columns["solution"], f" I think {int(result) + 1}", ""]
        judged = AnswerJudge("number").score([Candidate(row.prompt, text, row.columns) for text in completions])
        assert [one.score for one in judged] == [1, 0, 0]


def test_what_there_is_not():
    for options, what in [
        ({"split": "test"}, "no split 'test'"),
        ({"levels": [9]}, "no level 9"),
        ({"levels": []}, "levels not empty"),
    ]:
        with pytest.raises(UsageError, match=what):
            problems(**{"split": "heldout", "count": 3, **options})


def test_more_problems_than_there_are(monkeypatch):
    monkeypatch.setattr(arithmetic, "_THINGS", ("eggs",))
    monkeypatch.setattr(arithmetic, "_PEOPLE", ("Ada", "Ben"))
    with pytest.raises(UsageError, match="fewer than 1000 different problems"):
        problems("heldout", 1000, levels=[1])


def test_a_problem_as_it_is():
    # Results that are published name these problems.
    (row,) = problems("heldout", 1, levels=[2])
    assert question(row) == "Ben buys 9 coins a day for 5 days. How many coins does Ben buy?\nA:"
    assert row.columns == {"answer": "45", "solution": " 9 * 5 = 45", "level": 2}
    assert row.prompt.startswith(
        "Q: Sam has 4 boxes of 3 pens each. How many pens does Sam have?\nA: 4 * 3 = 12\n\nQ:"
    )
