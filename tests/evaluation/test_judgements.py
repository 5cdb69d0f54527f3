import json

import pytest

from prefopt.evaluation.judgements import (
    Preference,
    Score,
    preferences_by_prompt,
    read_judgements,
    scores_by_prompt,
    text_hash,
)
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter


def test_judgements_are_read_as_they_were_written(tmp_path):
    written = [
        Score("a", 0, "exact", 1.0, judge_hash="h", text_hash=text_hash("x"), round=2),
        Score("a", 1, "llm", None, abstain=True, reason="abstained", raw="I cannot"),
        Preference("a", (1, 0), "llm", 0, order=1, repeat=2, raw="B", text_hash=text_hash("x", "y")),
        Preference("a", (0, 1), "llm", None, tie=True),
        Preference("a", (0, 1), "rm", 0, probability=0.75),
    ]
    with JsonlWriter(tmp_path / "j.jsonl") as file:
        file.write(one.line() for one in written)
    assert list(read_judgements(tmp_path / "j.jsonl")) == written
    assert len({one.key for one in written}) == 5


def test_a_file_by_hand_needs_few_fields(tmp_path):
    rows = [{"prompt_id": "a", "index": 3, "score": 2}, {"prompt_id": "a", "indices": [2, 1], "winner": 1}]
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_judgements(path)) == [Score("a", 3, "file", 2.0), Preference("a", (2, 1), "file", 1, order=1)]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"index": 0, "score": 1}, "no prompt_id; a score needs"),
        ({"prompt_id": "a", "index": 0}, "no score"),
        ({"prompt_id": "a", "index": "0", "score": 1}, "index must be a whole number, not '0'"),
        ({"prompt_id": "a", "index": 0, "score": float("nan")}, "score must be a finite number or null, not nan"),
        ({"prompt_id": "a", "index": 0, "score": True}, "score must be a finite number or null, not True"),
        ({"prompt_id": "a", "indices": [0, 0], "winner": 0}, "the indices must differ"),
        ({"prompt_id": "a", "indices": [0, 1], "winner": 2}, "winner 2"),
        ({"prompt_id": "a", "indices": [0, 1], "winner": 0, "tie": True}, "tie True"),
        ({"prompt_id": "a", "indices": [0], "winner": 0}, "numbers of two samples"),
        ({"prompt_id": "a", "indices": [0, 1], "probability": 1.5}, "must be in"),
        ({"prompt_id": "a", "kind": "rank"}, "kind must be score or preference"),
        ({"schema": "prefopt.judgements/2"}, "reads prefopt.judgements/1"),
    ],
)
def test_lines_that_are_no_judgements_are_named(tmp_path, row, what):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=f"j.jsonl, object 1.*{what}"):
        list(read_judgements(path))


def test_scores_are_the_weighted_mean_of_judges():
    judged = [
        Score("a", 0, "x", 1.0), Score("a", 0, "y", 4.0), Score("a", 1, "x", 0.0), Score("a", 1, "y", None),
        Score("b", 0, "x", 0.5), Score("b", 0, "y", 0.5), Preference("a", (0, 1), "x", 0),
    ]  # fmt: skip
    # Sample 1 of a has no score of y, so it has no mean.
    assert scores_by_prompt(judged) == {"a": {0: 2.5}, "b": {0: 0.5}}
    assert scores_by_prompt(judged, {"x": 3, "y": 1}) == {"a": {0: 1.75}, "b": {0: 0.5}}
    assert scores_by_prompt(judged, {"x": 2}) == {"a": {0: 1.0, 1: 0.0}, "b": {0: 0.5}}
    with pytest.raises(UsageError, match="weights of x, y must sum to a number above 0"):
        scores_by_prompt(judged, {"x": 1, "y": -1})


def test_a_sample_that_one_judge_never_saw_has_no_mean():
    assert scores_by_prompt([Score("a", 0, "x", 1.0), Score("a", 0, "y", 1.0), Score("a", 1, "x", 1.0)]) == {
        "a": {0: 1.0}
    }


def test_preferences_are_the_mean_over_orders_then_judges():
    judged = [
        Preference("a", (0, 1), "x", 0), Preference("a", (1, 0), "x", 1, order=1),  # x follows the position: 0.5
        Preference("a", (0, 1), "y", None, probability=0.25), Preference("a", (1, 0), "y", None, probability=0.25),
        Preference("a", (0, 2), "x", None, tie=True), Preference("a", (1, 2), "x", None, reason="unparsable"),
    ]  # fmt: skip
    # y says 0.25 and 1 - 0.25 for sample 0: 0.5. Nobody judged (1, 2).
    assert preferences_by_prompt(judged) == {"a": {(0, 1): 0.5, (0, 2): 0.5}}
    judged[3] = Preference("a", (1, 0), "y", None, probability=0.75)
    assert preferences_by_prompt(judged) == {"a": {(0, 1): 0.375, (0, 2): 0.5}}
    assert preferences_by_prompt(judged, {"x": 1, "y": 3}) == {"a": {(0, 1): 0.3125, (0, 2): 0.5}}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"score": 1}, {"score": 2}], "object 2: judge 'file' scores sample 0 of prompt a a second time"),
        ([{"score": None, "abstain": "false"}], "abstain must be true or false, not 'false'"),
        ([{"indices": [0, 1], "tie": "no"}], "tie must be true or false, not 'no'"),
    ],
)
def test_judgements_that_would_be_read_wrongly_are_refused(tmp_path, rows, what):
    path = tmp_path / "j.jsonl"
    path.write_text("".join(json.dumps({"prompt_id": "a", "index": 0, **row}) + "\n" for row in rows))
    with pytest.raises(UsageError, match=what):
        list(read_judgements(path))
