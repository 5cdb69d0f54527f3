"""Rows with several completions of one prompt: read, checked, tokenized and described."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import DataError, kind, normalise, read_preferences, tokenize_dataset, tokenize_row, validate
from prefopt.data.fingerprint import fingerprint
from prefopt.data.one_pass import one_pass
from prefopt.data.prepare import check_ids, tokenize_checked
from prefopt.data.reading import described
from prefopt.data.validate import row_check
from tests.tiny import make_tokenizer

GOOD = {"prompt": "What is 2 + 2?", "completions": [" 4", " 5", " four"], "scores": [3.0, 1.0, 2.5]}
TOKENIZER = make_tokenizer()


def one(**changes):
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (one(completions=None), "null completions"),
        (one(completions=[" 4", None, " 5"]), "null completions"),
        (one(completions=[" 4", "  ", " 5"]), "empty completions"),
        (one(completions=[" 4"], scores=[1.0]), "fewer than two completions"),
        (one(completions=[" 4"] * 3), "all completions are equal"),
        (one(scores=[1.0, math.nan, 2.0]), "bad scores"),
        (one(scores=[1.0, math.inf, 2.0]), "bad scores"),
        (one(scores=[1.0, 1e31, 2.0]), "bad scores"),
        (one(scores=None), "bad scores"),
        (one(scores=[1.0, 2.0]), "scores do not fit"),
    ],
)
def test_a_group_that_cannot_be_trained_on_is_named(row, problem):
    report = validate(Dataset.from_list([GOOD, row]))
    assert [(found.kind, found.rows) for found in report.problems if found.severity == "error"] == [(problem, [1])]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (one(completions=[" 4", " 4", " 5"]), "equal completions"),
        (one(scores=[1.0] * 3, prompt="other"), "all scores are equal"),
        (GOOD, "duplicate row"),
    ],
)
def test_a_doubtful_group_is_kept_and_named(row, problem):
    report = validate(Dataset.from_list([GOOD, row]))
    assert report.ok
    assert [found.kind for found in report.problems] == [problem]


def test_a_score_that_is_text_is_named():
    report = validate(Dataset.from_list([one(scores=["3", "1", "2"])]))
    assert [found.kind for found in report.problems] == ["bad scores"]


def test_groups_of_different_sizes_and_without_scores_are_in_order():
    rows = Dataset.from_list(
        [{"prompt": "a", "completions": ["b", "c"]}, {"prompt": "d", "completions": list("efgh")}]
    )
    assert kind(rows) == "group"
    assert not validate(rows).problems


def test_lengths_are_those_of_every_completion():
    rows = Dataset.from_list([one(completions=[" 4", " 5 and more of it" * 9, " four"])])
    check = {"tokenizer": TOKENIZER, "truncation_mode": "keep_start"}
    assert not validate(rows, max_length=400, **check).problems
    assert [p.kind for p in validate(rows, max_length=30, **check).problems] == ["truncated completion"]
    alike = Dataset.from_list([one(completions=[" a" * 60 + end for end in "bcd"])])
    assert [p.kind for p in validate(alike, max_length=40, **check).problems] == ["same tokens at this length"]
    assert not validate(
        Dataset.from_list([one(completions=[" a" * 60, " a" * 60 + "b", " c"])]), max_length=400, **check
    ).problems


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_answers_become_messages_after_messages_and_prompts_before_them():
    asked = [{"role": "user", "content": "2 + 2?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    for prompt, completions in ((asked, ["4", "5"]), ("2 + 2?", answers), (asked, [text[0] for text in answers])):
        rows = normalise(Dataset.from_list([{"prompt": prompt, "completions": completions, "scores": [2, 1]}]))
        assert rows[0]["prompt"] == asked
        assert rows[0]["completions"] == answers
        assert not validate(rows, tokenizer=TOKENIZER).problems


def test_published_layouts_are_told_how_to_become_groups(tmp_path):
    answers = [{"response": "r1", "overall_score": 7.5}, {"response": "r2", "overall_score": 8.0}]
    with pytest.raises(DataError, match=r"--answers completions --text response --score overall_score.*--lists"):
        normalise(Dataset.from_list([{"prompt": "q", "completions": answers}]))


def test_single_texts_under_the_name_completions_are_no_groups():
    with pytest.raises(DataError, match="completion=completions"):
        normalise(Dataset.from_list([{"prompt": "q", "completions": "a", "label": True}]))


def test_pairs_with_other_columns_of_these_names_stay_pairs():
    rows = Dataset.from_list(
        [{"prompt": "q", "chosen": "a", "rejected": "b", "completions": ["a", "b"], "scores": [1]}]
    )
    assert kind(rows) == "pair"
    plain = rows.remove_columns(["completions", "scores"])
    assert fingerprint(rows) == fingerprint(plain)
    ids = [one_pass(some, row_check(some, TOKENIZER, None)).ids for some in (rows, plain)]
    assert ids[0][:] == ids[1][:]


def test_a_digest_of_groups_depends_on_scores_and_completions():
    digests = {
        fingerprint(Dataset.from_list([row]))
        for row in (GOOD, one(scores=[1.0, 2.0, 3.0]), one(completions=[" 4", " 5", " 6"]))
    }
    assert len(digests) == 3


def test_a_file_of_groups_is_read_and_described(tmp_path):
    file = tmp_path / "groups.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    lines = list(described(read_preferences(str(file))))
    assert lines[0] == "Read as plain text: prompt, completions, scores."
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "prompt", *(f"completions[{n}]" for n in range(3)), "scores"
    ]  # fmt: skip
    assert lines[-1].endswith("'[3.0, 1.0, 2.5]'")


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_every_completion_has_the_ids_that_it_has_in_a_pair():
    row = tokenize_row(GOOD, TOKENIZER)
    for place, text in enumerate(GOOD["completions"]):
        pair = tokenize_row({"prompt": GOOD["prompt"], "chosen": text, "rejected": " x"}, TOKENIZER)
        assert row["prompt_ids"] == pair["prompt_ids"]
        assert row["completions_ids"][place] == pair["chosen_ids"]


def test_every_way_to_tokenize_gives_the_same_ids():
    rows = Dataset.from_list([GOOD, one(prompt="other", completions=[" a", " b"], scores=[1.0, 2.0])])
    expected = [tokenize_row(row, TOKENIZER)["completions_ids"] for row in rows]
    cut = {"max_length": 100, "truncation_mode": "keep_start", "name": "train"}
    stream = IterableDataset.from_generator(lambda: iter(rows))
    for made in (
        tokenize_dataset(rows, TOKENIZER),
        tokenize_checked(rows, TOKENIZER, **cut),
        list(tokenize_checked(stream, TOKENIZER, **cut)),
        one_pass(rows, row_check(rows, TOKENIZER, 100), num_proc=2).ids,
    ):
        assert [row["completions_ids"] for row in made] == expected


def test_bad_ids_and_scores_of_tokenized_groups_are_named():
    good = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9]], "scores": [1.0, 2.0]}
    cut = {"max_length": 100, "truncation_mode": "keep_start", "name": "train"}
    check_ids(Dataset.from_list([good]), **cut)
    for change, problem in (
        ({"scores": [1.0]}, "scores do not fit"),
        ({"completions_ids": [[7, -8], [9]]}, "wrong type: ids"),
        ({"completions_ids": [[7], [7]]}, "all completions are equal"),
        ({"completions_ids": [[7], []]}, "no tokens"),
    ):
        with pytest.raises(DataError, match=problem):
            check_ids(Dataset.from_list([{**good, **change}]), **cut)


def test_win_probabilities_become_mean_scores_and_what_is_no_matrix_is_named():
    matrix = [[0.5, 0.9, 0.6], [0.1, 0.5, 0.2], [0.4, 0.8, 0.5]]
    rows = [
        {"prompt": "p", "completions": [" a", " b", " c"], "win_probabilities": matrix},
        {"prompt": "q", "completions": [" a", " b"], "win_probabilities": [[None, 0.7], [0.3, None]]},
        {"prompt": "r", "completions": [" a", " b"], "win_probabilities": [[0.5, 0.7], [0.7, 0.5]]},
        {"prompt": "s", "completions": [" a", " b"], "win_probabilities": [[0.5, 1.2], [-0.2, 0.5]]},
        {"prompt": "t", "completions": [" a", " b", " c"], "win_probabilities": [[0.5, 0.7], [0.3, 0.5]]},
    ]
    groups = normalise(Dataset.from_list(rows))
    assert groups.column_names == ["prompt", "completions", "scores"]
    assert groups[0]["scores"] == pytest.approx([0.75, 0.15, 0.6])
    assert groups[1]["scores"] == pytest.approx([0.7, 0.3])
    problems = {found.kind: found.rows for found in validate(groups).problems}
    assert problems == {"bad scores": [2, 3], "scores do not fit": [4]}


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_written_as_json_text_are_lists(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "groups.csv"
    path.write_text('prompt,completions,scores\nSay.,"[""a"", ""[b]""]","[1, 2.5]"\nGo.,"[""c"", ""d""]","[3, 1]"\n')
    data = read_preferences(str(path), streaming=streaming)
    assert [(row["completions"], row["scores"]) for row in data] == [(["a", "[b]"], [1, 2.5]), (["c", "d"], [3, 1])]
    if not streaming:
        assert validate(data).counts() == {}


@pytest.mark.parametrize(
    ("name", "numbers", "best_first"),
    [
        ("rewards", [0.1, 0.9], "ba"),
        ("ranks", [1, 2], "ab"),
        ("labels", [False, True], "ba"),
        ("score", ["2", "1"], "ab"),
    ],
)
def test_numbers_that_order_completions_under_another_name_are_asked_about(
    name: str, numbers: list[Any], best_first: str, tmp_path: Path
) -> None:
    rows = [{"prompt": "Say a.", "completions": ["a", "b"], name: numbers}] * 2
    data, out = tmp_path / "data.jsonl", tmp_path / "groups.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=f"Column '{name}' has a number for each of the 'completions'") as raised:
        read_preferences(str(data))
    command = shlex.split(str(raised.value).partition("run: prefopt ")[2].partition("--lists.")[0] + "--lists")
    command[command.index("groups.jsonl")] = str(out)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert read_preferences(str(out))[0]["completions"] == [*best_first]
    in_order = read_preferences(str(data), columns={"unused": name})
    assert in_order[0]["completions"] == ["a", "b"]
