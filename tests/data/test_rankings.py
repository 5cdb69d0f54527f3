"""Rankings and comparisons are told to be paired first, with a command that works, and are paired by it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import DataError, normalise
from prefopt.data.rankings import Pairing, pair

Row = dict[str, Any]


def talk(answer: str) -> list[Row]:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]


PUBLISHED: dict[str, tuple[list[Row], list[Row]]] = {
    "nectar": (
        [{"prompt": "Hi", "answers": [{"answer": "Go.", "rank": 2.0}, {"answer": "Hello.", "rank": 1.0}]}],
        [{"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}],
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "Hi",
                "completions": [{"response": r, "overall_score": s} for r, s in (("c", 1.0), ("a", 9.0), ("b", 5.0))],
            }
        ],
        [{"prompt": "Hi", "chosen": "a", "rejected": "c", "chosen_score": 9.0, "rejected_score": 1.0}],
    ),
    "two lists": (
        [{"prompt": "Hi", "responses": ["b", "a"], "scores": [0.1, 0.9]}],
        [{"prompt": "Hi", "chosen": "a", "rejected": "b", "chosen_score": 0.9, "rejected_score": 0.1}],
    ),
    "shp": (
        [
            {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 0, "score_A": 2, "score_B": 9},
            {"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1, "score_A": 9, "score_B": 2},
        ],
        [
            {"prompt": "Why?", "chosen": "No.", "rejected": "So."},
            {"prompt": "How?", "chosen": "So.", "rejected": "No."},
        ],
    ),
    "arena": (
        [
            {"model_a": "x", "model_b": "y", "winner": w, "conversation_a": talk("a"), "conversation_b": talk("b")}
            for w in ("model_b", "tie", "model_a")
        ],
        [{"chosen": talk("b"), "rejected": talk("a")}, {"chosen": talk("a"), "rejected": talk("b")}],
    ),
    "webgpt": (
        [
            {
                "question": {"id": "1", "full_text": "Hi you"},
                "answer_0": "a",
                "score_0": x,
                "answer_1": "b",
                "score_1": -x,
            }
            for x in (0.5, 0.0, -1.0)
        ],
        [
            {"prompt": "Hi you", "chosen": "a", "rejected": "b", "chosen_score": 0.5, "rejected_score": -0.5},
            {"prompt": "Hi you", "chosen": "b", "rejected": "a", "chosen_score": 1.0, "rejected_score": -1.0},
        ],
    ),
    "arena with a column a winner": (
        [
            {"prompt": "Hi", "response_a": "a", "response_b": "b", "winner_model_a": a, "winner_model_b": b}
            for a, b in ((0, 1), (0, 0))
        ],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 1.0, "rejected_score": 0.0}],
    ),
    "summaries with the place of the better": (
        [{"info": {"post": "Long."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": n} for n in (1, 0)],
        [
            {"prompt": "Long.", "chosen": "b", "rejected": "a"},
            {"prompt": "Long.", "chosen": "a", "rejected": "b"},
        ],
    ),
    "an answer a row": (
        [
            {"prompt": prompt, "response": answer, "helpfulness": n, "turns": 1}
            for prompt, answer, n in (("Hi", "a", 1), ("Ho", "c", 2), ("Hi", "b", 3), ("Hi", "d", 2), ("Ho", "e", 0))
        ],
        [
            {"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 3.0, "rejected_score": 1.0},
            {"prompt": "Ho", "chosen": "c", "rejected": "e", "chosen_score": 2.0, "rejected_score": 0.0},
        ],
    ),
    "a rank a row": (
        [{"prompt": "Hi", "text": answer, "rank": n} for n, answer in enumerate(("a", "b", "c"))],
        [{"prompt": "Hi", "chosen": "a", "rejected": "c"}],
    ),
    "a rank a side": (
        [{"prompt": "Hi", "response_a": "a", "response_b": "b", "rank_a": n, "rank_b": 3 - n} for n in (2, 1)],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}],
    ),
    "lists written as JSON text": (
        [{"prompt": "Hi", "responses": '["b", "[1, 2]"]', "scores": "[0.1, 0.9]"}],
        [{"prompt": "Hi", "chosen": "[1, 2]", "rejected": "b", "chosen_score": 0.9, "rejected_score": 0.1}],
    ),
    "objects written as JSON text": (
        [{"prompt": "Hi", "answers": '[{"text": "b", "rank": 2}, {"text": "a", "rank": 1}]'}],
        [{"prompt": "Hi", "chosen": "a", "rejected": "b"}],
    ),
    "answers that are JSON, one a row": (
        [{"prompt": "Hi", "response": answer, "score": n} for n, answer in enumerate(("[1]", "[2]"))],
        [{"prompt": "Hi", "chosen": "[2]", "rejected": "[1]", "chosen_score": 1.0, "rejected_score": 0.0}],
    ),
    "scores of each side written as text": (
        [{"prompt": "Hi", "response_a": "a", "response_b": "b", "score_a": "9", "score_b": "10"}],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 10.0, "rejected_score": 9.0}],
    ),
    "a score with rank in its name": (
        [{"prompt": "Hi", "response": answer, "rank_score": n} for n, answer in enumerate(("a", "b"))],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 1.0, "rejected_score": 0.0}],
    ),
    "a quality behind a length": (
        [{"prompt": "Hi", "response": a, "n_tokens": t, "quality": q} for a, t, q in (("a", 30, 1), ("b", 3, 2))],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 2.0, "rejected_score": 1.0}],
    ),
    "scores written as text": (
        [{"prompt": "Hi", "responses": ["a", "b", "c"], "scores": ["9", "10", "N/A"]}],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 10.0, "rejected_score": 9.0}],
    ),
    "sides that are messages without their prompt": (
        [{"prompt": talk("x")[:1], "response_a": talk("a")[1:], "response_b": talk("b")[1:], "winner": "model_b"}],
        [{"prompt": talk("x")[:1], "chosen": talk("b")[1:], "rejected": talk("a")[1:]}],
    ),
    "ranked messages": (
        [{"context": talk("x")[:1], "completions": [{"rank": r, "completion": talk(str(r))[1:]} for r in (1, 0)]}],
        [{"prompt": talk("x")[:1], "chosen": talk("0")[1:], "rejected": talk("1")[1:]}],
    ),
    "the winner's column, and blanks in names": (
        [{"query": "Hi", "response 1": "a", "response 2": "b", "preference_label": "response 2"}],
        [{"prompt": "Hi", "chosen": "b", "rejected": "a"}],
    ),
    "one winner seen": (
        [{"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": "A"}],
        [{"prompt": "Hi", "chosen": "a", "rejected": "b"}],
    ),
    "helpsteer3": (
        [{"context": talk("x")[:1], "response1": "a", "response2": "b", "overall_preference": n} for n in (-2, 0, 3)],
        [
            {"prompt": talk("x")[:1], "chosen": "a", "rejected": "b"},
            {"prompt": talk("x")[:1], "chosen": "b", "rejected": "a"},
        ],
    ),
}


ONE_A_ROW = {
    *("an answer a row", "a rank a row", "answers that are JSON, one a row"),
    *("a score with rank in its name", "a quality behind a length"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_that_is_printed_pairs_the_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows, pairs = PUBLISHED[name]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = CliRunner()
    told = run.invoke(app, ["check", "data.jsonl"])
    assert told.exit_code == 1
    assert "paired first" in told.output
    assert "--columns" not in told.output
    command = re.search(r"prefopt (pair data\.jsonl .*?)\. ", told.output)
    assert command is not None
    done = run.invoke(app, shlex.split(command[1]))
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()] == pairs
    ties = 0 if name in ONE_A_ROW else len(rows) - len(pairs)
    assert f"{len(pairs)} pairs from {len(rows)} rows; {ties} rows made none" in done.output
    assert run.invoke(app, ["check", "pairs.jsonl"]).exit_code == 0


def test_a_length_or_a_loss_is_not_taken_for_a_score() -> None:
    rows = [{"prompt": "Hi", "response": a, "length": n, "perplexity": 1.0 / n} for n, a in enumerate("ab", start=1)]
    asked = r"--score NAME\. Put the column that orders them \(length, perplexity\) in the place of NAME"
    with pytest.raises(DataError, match=asked):
        normalise(Dataset.from_list(rows))


def test_a_verdict_that_does_not_say_its_side_is_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "response_1": "a", "response_2": "b", "winner": n} for n in (1, 2)]
    with pytest.raises(
        DataError, match=r"--first-wins=\.\.\. --second-wins=\.\.\.\. Put the values of 'winner' \(here 1, 2\)"
    ):
        normalise(Dataset.from_list(rows))


def test_all_pairs_of_a_ranking_and_ties(tmp_path: Path) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    answers = [{"text": t, "rank": r} for t, r in (("c", 3), ("a", 1), ("b", 1), (None, 2))]
    path.write_text(json.dumps({"answers": answers}) + "\n" + json.dumps({"answers": answers[1:3]}))
    options = ["--out", str(out), "--answers", "answers", "--text", "text", "--rank", "rank", "--every"]
    done = CliRunner().invoke(app, ["pair", str(path), *options])
    assert "2 pairs from 2 rows; 1 rows made none" in done.output.replace("\n", " ")
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made == [{"chosen": "a", "rejected": "c"}, {"chosen": "b", "rejected": "c"}]


def paired(row: Row, **how: Any) -> list[Row]:
    return [*pair([{"prompt": "Hi", **row}], Pairing("prompt", **how), Counter())]


def test_answers_without_a_number_are_left_out_and_equal_ones_count_once() -> None:
    def answers(numbers: list[Any], texts: str = "abc") -> Row:
        return {"texts": [*texts], "numbers": numbers}

    by = {"answers": "texts", "score": "numbers"}
    best = {"prompt": "Hi", "chosen": "c", "rejected": "a", "chosen_score": 10.0, "rejected_score": 3.0}
    assert paired(answers([3, math.nan, 10]), **by) == [best]
    group = {"prompt": "Hi", "completions": ["c", "a"], "scores": [10.0, 3.0]}
    assert paired(answers([3, "N/A", "10"]), lists=True, **by) == [group]
    # The two texts are of 5 on average.
    merged = {"prompt": "Hi", "chosen": "b", "rejected": "a", "chosen_score": 6.0, "rejected_score": 5.0}
    assert paired(answers([1, 6, 9], "aba"), every=True, **by) == [merged]
    assert paired({"a": "x", "b": "x", "winner": "a"}, first="a", second="b", winner="winner", first_wins=("a",)) == []
    rollouts = {"texts": [{"text": "x", "check": {"right": False}}, {"text": "y", "check": {"right": True}}]}
    right = {"prompt": "Hi", "chosen": "y", "rejected": "x", "chosen_score": 1.0, "rejected_score": 0.0}
    assert paired(rollouts, answers="texts", text="text", score="check.right") == [right]


@pytest.mark.parametrize(
    ("row", "how", "message"),
    [
        ({"a": ["x", "y"], "s": [1, 9, 3]}, {"score": "s"}, r"Row 0 has 2 answers in 'a', and in 's' is \[1, 9, 3\]"),
        ({"a": [{"t": "x", "s": 1}]}, {"score": "s"}, "answers with the fields t, s: name the one .* --text"),
        ({"a": [{"t": "x", "s": 1}]}, {"score": "s", "text": "text"}, "neither a column 'text' nor .* fields t, s"),
        ({"a": [{"t": "x", "s": 1}]}, {"score": "score", "text": "t"}, "neither a column 'score' nor"),
        ({"a": "x"}, {"score": "s"}, "Row 0 has no column 's'"),
        ({"a": {"x": 1}}, {"score": "s"}, "no list and no text in 'a'"),
    ],
)
def test_options_that_name_nothing_and_numbers_that_do_not_fit_are_named(row: Row, how: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired(row, answers="a", **how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--first", "a"], "Two answers need all of"),
        (["--answers", "a"], "needs what orders them"),
        (["--answers", "a", "--rank", "r", "--first", "b"], "pass one of the two"),
        (["--answers", "nothing", "--rank", "r"], "no column 'nothing'"),
        (
            ["--first", "a", "--second", "b", "--winner", "w", "--first-wins", "x", "--second-wins", "y"],
            "None of the 1",
        ),
    ],
)
def test_what_makes_no_pair_is_refused_and_nothing_written(tmp_path: Path, options: list[str], message: str) -> None:
    path, out = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"a": "x", "b": "y", "w": "tie", "r": 1}))
    done = CliRunner().invoke(app, ["pair", str(path), "--out", str(out), *options])
    assert done.exit_code == 1
    assert message in done.output
    assert not out.exists()


def test_questions_with_one_answer_are_no_preferences() -> None:
    with pytest.raises(DataError, match="supervised fine-tuning") as raised:
        normalise(Dataset.from_list([{"question": "2+2?", "answer": "4"}]))
    assert "--columns" not in str(raised.value)
