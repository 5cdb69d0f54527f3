"""Every kind of bad row is found, counted, named by its first rows, and refused or dropped in the open."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from prefopt.data import DataError, Report, clean, normalise, tokenize_dataset, validate
from prefopt.trainer.publishing import NOT_PUBLISHED
from tests.tiny import THINKING, make_tokenizer


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TEXT = {"prompt": "q", "chosen": "good", "rejected": "bad"}
CHAT = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
UNPAIRED = {"prompt": "q", "completion": "a", "label": True}

# What is wrong with row 1 of 2 -> the rows, the kind and the advice that the message must hold.
BAD = {
    "null prompt": (TEXT, {"prompt": None}, "null prompt", "Fill it in"),
    "blank prompt": (TEXT, {"prompt": " \n"}, "empty prompt", "only white space"),
    "null chosen": (TEXT, {"chosen": None}, "null chosen", "Column 'chosen' is null"),
    "empty chosen": (TEXT, {"chosen": ""}, "empty chosen", "Column 'chosen' has no text"),
    "blank rejected": (TEXT, {"rejected": "\t"}, "empty rejected", "Column 'rejected'"),
    "no messages": (CHAT, {"chosen": []}, "empty chosen", "has no text"),
    "empty message": (CHAT, {"rejected": [assistant(" ")]}, "empty rejected", "has no text"),
    "null content": (CHAT, {"rejected": [assistant(None)]}, "empty rejected", "has no text"),
    "equal text": (TEXT, {"rejected": "good"}, "chosen equals rejected", "no preference to learn"),
    "equal messages": (CHAT, {"rejected": [assistant("good")]}, "chosen equals rejected", "Delete the row"),
    "answered prompt": (
        CHAT,
        {"prompt": [user("q"), assistant("a")]},
        "wrong role: prompt ends",
        "Move that message",
    ),
    "user completion": (CHAT, {"chosen": [user("good")]}, "wrong role: chosen is not", "Move what comes before"),
    "unknown role": (
        CHAT,
        {"prompt": [{"role": "human", "content": "q"}]},
        "wrong role: unknown in prompt",
        "human",
    ),
    "number": (TEXT, {"chosen": 3}, "wrong type: chosen", "neither text nor"),
    "sharegpt": (CHAT, {"chosen": [{"from": "gpt", "value": "a"}]}, "wrong type: chosen", "not 'from'/'value'"),
    "two styles": (TEXT, {"chosen": [assistant("a")]}, "wrong type: text beside", "one way"),
    "label": (UNPAIRED, {"label": None}, "wrong type: label", "true or false"),
    "empty completion": (UNPAIRED, {"completion": ""}, "empty completion", "Column 'completion'"),
    "negative weight": ({**TEXT, "weight": 1.0}, {"weight": -1.0}, "bad weight", "0 or more"),
    "nan weight": ({**TEXT, "weight": 1.0}, {"weight": float("nan")}, "bad weight", "not finite"),
    "null weight": ({**TEXT, "weight": 1.0}, {"weight": None}, "bad weight", "missing"),
    "text weight": ({**TEXT, "weight": "1"}, {"weight": "heavy"}, "bad weight", "not a number"),
}


class Rows(list[dict[str, Any]]):
    """Rows of any types, which Arrow might refuse, with what validation asks of a stream."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.mark.parametrize("name", BAD)
def test_each_bad_row_is_named_in_the_message(name: str) -> None:
    good, change, kind, advice = BAD[name]
    rows = Rows([{**good}, {**good, **change}])
    report = validate(rows)
    assert not report.ok
    with pytest.raises(DataError) as caught:
        clean(rows, report)
    message = str(caught.value)
    line = next(line for line in message.splitlines() if line.strip().startswith(kind))
    assert advice in line
    assert "first 0, 1" in line if name == "text weight" else ": 1 row, first 1." in line
    assert "--on_bad_rows drop" in message


def _table(report: Report) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


def test_good_rows_have_no_problem() -> None:
    tools = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "1"}]
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    rows = Rows([CHAT, {**CHAT, "chosen": [*tools, assistant("x")]}, {**CHAT, "prompt": image}])
    report = validate(rows)
    assert (report.problems, report.ok, report.total) == ([], True, 3)
    assert clean(rows, report) is rows
    assert "no problem found" in _table(report)


def test_duplicates_and_contradictions_are_warnings() -> None:
    swapped = {**TEXT, "chosen": "bad", "rejected": "good"}
    report = validate(Dataset.from_list([TEXT, TEXT, swapped, {**TEXT, "prompt": "other"}]))
    assert {problem.kind: problem.rows for problem in report.problems} == {
        "duplicate row": [1],
        "contradicts an earlier row": [2],
    }
    assert report.ok
    assert "An earlier row prefers the opposite" in _table(report)
    unpaired = validate(Dataset.from_list([UNPAIRED, UNPAIRED, {**UNPAIRED, "label": False}]))
    assert unpaired.counts() == {"duplicate row": 1, "contradicts an earlier row": 1}


def test_a_user_turn_inside_a_completion_is_a_warning() -> None:
    report = validate(Rows([{**CHAT, "chosen": [assistant("a"), user("b"), assistant("c")]}]))
    assert report.counts() == {"user turn inside chosen": 1}
    assert report.ok


def test_nulls_that_arrow_fills_in_do_not_hide_equal_sides() -> None:
    filled = {**CHAT, "rejected": [{**assistant("good"), "tool_calls": None}]}
    assert validate(Rows([filled])).counts() == {"chosen equals rejected": 1}


@pytest.mark.parametrize("tokenized", [False, True])
def test_lengths(tokenized: bool) -> None:
    tokenizer = make_tokenizer()
    dataset = Dataset.from_list([TEXT, {**TEXT, "prompt": "q " * 40}, {**TEXT, "chosen": "good " * 40}])
    given = {} if tokenized else {"tokenizer": tokenizer}
    report = validate(tokenize_dataset(dataset, tokenizer) if tokenized else dataset, max_length=20, **given)
    assert {problem.kind: problem.rows for problem in report.problems} == {
        "no room for a completion": [1],
        "truncated completion": [2],
    }
    assert report.bad_rows == [1]
    with pytest.raises(DataError, match=r"no room for a completion: 1 row, first 1.* Raise max_length"):
        clean(dataset, report)
    with pytest.raises(ValueError, match="max_length needs a tokenizer"):
        validate(dataset, max_length=20)


def test_prompts_that_are_no_token_prefix_are_an_info() -> None:
    report = validate(Dataset.from_list([CHAT]), tokenizer=make_tokenizer(THINKING))
    (problem,) = report.problems
    assert (problem.kind, problem.severity, report.ok) == ("prompt is not a token prefix", "info", True)
    assert "the completion is scored correctly" in _table(report)


def test_a_conversation_that_the_template_refuses_is_reported() -> None:
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    report = validate(Dataset.from_list([CHAT]), tokenizer=refusing)
    assert report.counts() == {"refused by the chat template": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_drop_removes_bad_rows_and_writes_them_down(tmp_path: Path, streaming: bool) -> None:
    rows = [TEXT, {**TEXT, "chosen": ""}, {**TEXT, "prompt": "other"}, {**TEXT, "prompt": "é", "rejected": "good"}]
    dataset = Dataset.from_list(rows)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    path = tmp_path / "run" / "dropped.jsonl"
    kept = clean(dataset, validate(dataset), "drop", path)
    assert list(kept) == [rows[0], rows[2]]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"row": 1, "reasons": ["empty chosen"], "example": rows[1]},
        {"row": 3, "reasons": ["chosen equals rejected"], "example": rows[3]},
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["dropped.jsonl"]


def test_rows_of_a_killed_write_are_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def killed(*_: Any) -> None:
        names.extend(entry.name for entry in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("prefopt.safety.files.to_disk", killed)
    dataset = Dataset.from_list([TEXT, {**TEXT, "chosen": ""}])
    with pytest.raises(KeyboardInterrupt):
        clean(dataset, validate(dataset), "drop", tmp_path / "dropped_training_rows.jsonl")
    assert names
    assert all(any(fnmatch(name, pattern) for pattern in NOT_PUBLISHED) for name in names)


def test_dropping_everything_or_dropping_unseen_is_refused(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{**TEXT, "chosen": ""}])
    report = validate(dataset)
    with pytest.raises(DataError, match="Every row would be dropped"):
        clean(dataset, report, "drop", tmp_path / "dropped.jsonl")
    with pytest.raises(ValueError, match="'error' or 'drop'"):
        clean(dataset, report, "ignore")  # type: ignore[arg-type]
    two = Dataset.from_list([TEXT, {**TEXT, "chosen": ""}])
    with pytest.raises(ValueError, match="needs dropped_path"):
        clean(two, validate(two), "drop")


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="has no rows"):
        validate(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


def test_the_table_counts_rows_from_zero_and_keeps_brackets() -> None:
    rows = [{**TEXT, "prompt": str(i), "chosen": "", "source": "[a].jsonl", "row": i + 100} for i in range(8)]
    table = _table(validate(Dataset.from_list(rows)))
    assert "8 rows, 8 with errors" in table
    assert "First: [a].jsonl:100, 101, 102, 103, 104 ..." in table
    assert "numbered from 0" in table


def test_a_mixed_file_loads_and_its_odd_row_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.data import load_preferences

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (TEXT, {**TEXT, "chosen": 3}, TEXT)))
    report = validate(normalise(load_preferences(str(path))))
    assert report.counts() == {"wrong type: chosen": 1, "duplicate row": 1}


@pytest.mark.parametrize(
    ("roles", "label", "told"),
    [
        (("chosen",), False, True),
        (("chosen",), True, False),
        (("rejected",), True, True),
        (("rejected",), False, False),
    ],
)
def test_rows_that_the_objective_learns_nothing_from_are_noted(roles, label, told):
    rows = [{"prompt": f"{n}?", "completion": "Yes.", "label": label} for n in range(2)]
    notes = validate(Rows(rows), roles=roles).notes
    assert [("alone learns nothing" in note) for note in notes] == [True] * told
