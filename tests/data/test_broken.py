"""Broken files and rows, one test a finding: where the trouble is said to be, and that sound neighbours still pass."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from prefopt.data import DataError, load_preferences, normalise, tokenize_row, validate
from tests.tiny import make_tokenizer

ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
TALK = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def read(folder: Path, name: str, content: bytes):
    path = folder / name
    path.write_bytes(content)
    return normalise(load_preferences(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(ROW).decode().encode("utf-16"), r"line 1: not UTF-8 text \(it begins as UTF-16"),
        (
            "a.jsonl",
            lines(ROW, {**ROW, "prompt": "\ud800"}),
            r"line 2: .*half of a character, '\\ud800'",
        ),
        ("a.jsonl", b'{"prompt":' + b"[" * 5000, "line 1: not valid JSON .nested too deeply"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON .Exceeds the limit .4300 digits"),
        ("a.jsonl", b"{}", "it holds no rows"),
        ("a.json", b"[]", "it holds no rows"),
        ("a.json", json.dumps([ROW, 3]).encode(), r"row 1 \(from 0\): a JSON int where an object"),
        ("a.csv", b"prompt,chosen,rejected\n", "it holds no rows"),
        ("a.csv", "prompt,chosen,rejected\né,b,c\n".encode("latin-1"), "it is not UTF-8 text"),
        ("a.jsonl", lines({**ROW, "extra": {"\0": 1, "": 2}}), "its rows cannot be read .*fields without a name"),
        (
            "a.jsonl",
            lines({"messages": None, "label": True}),
            "'messages' holds no list of messages in its first",
        ),
        ("a.jsonl", lines({"messages": 3, "label": True}), "'messages' holds no list of messages in its first 1 rows"),
    ],
)
def test_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=rf"(?s)({name.replace('.', '[.]')}.*)?{message}"):
        read(tmp_path, name, content)


def test_parquet_without_rows(tmp_path):
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ROW}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a[.]parquet: it holds no rows"):
        load_preferences(str(tmp_path / "a.parquet"))


def test_parquet_whose_text_is_none(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROW, {**ROW, "chosen": "unlike"}]), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"unlike", b"\xe3nlike"))
    with pytest.raises(DataError, match=r"a[.]parquet, column 'chosen': damaged .*UTF8"):
        load_preferences(str(path))


def test_columns_are_listed_shortly(tmp_path):
    """A file without a header has texts for names."""
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.csv", ",".join(f"text {i} " * 50 for i in range(60)).encode() + b"\n" + b"a," * 59 + b"b\n")
    assert "and 30 more" in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weight": 1e300}, "bad weight"),
        ({"weight": float("nan")}, "bad weight"),
        ({"weight": -1.0}, "bad weight"),
        ({"ref_chosen_logps": None}, "bad log-probability"),
        ({"prev_rejected_logps": "x"}, "bad log-probability"),
        ({**TALK, "tools": "no JSON"}, "wrong type: tools"),
        ({**TALK, "tools": 3}, "wrong type: tools"),
        ({**TALK, "chat_template_kwargs": "x"}, "wrong type: chat_template_kwargs"),
        ({**TALK, "chat_template_kwargs": {"tokenize": False}}, "wrong type: chat_template_kwargs"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [99999]}, "wrong type: ids"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [-1]}, "wrong type: ids"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "same tokens"),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, "no tokens"),
    ],
)
def test_rows(tmp_path, changes, problem):
    dataset = read(tmp_path, "a.jsonl", lines({**ROW, **changes}))
    report = validate(dataset, tokenizer=make_tokenizer(), max_length=100)
    assert problem in report.counts()
    assert report.bad_rows == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 0},
        {"weight": 1e9},
        {"ref_chosen_logps": -3.5, "ref_rejected_logps": -2},
        {**TALK, "tools": ""},
        {**TALK, "tools": '[{"type": "function"}]'},
        {**TALK, "chat_template_kwargs": {"enable_thinking": False}},
        {"tools": "not read for plain text"},
        {"prompt": "\u202eabc", "chosen": "\u200b", "rejected": "👩\u200d👧"},
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]},
    ],
)
def test_sound_rows_stay(tmp_path, changes):
    dataset = read(tmp_path, "a.jsonl", lines({**ROW, **changes}))
    assert validate(dataset, tokenizer=make_tokenizer(), max_length=100).ok


def test_contents_that_are_lists_of_texts_are_given_to_the_template_as_texts():
    parts = {
        name: [{**talk[0], "content": [{"type": "text", "text": talk[0]["content"]}]}] for name, talk in TALK.items()
    }
    assert validate(Dataset.from_list([parts]), tokenizer=make_tokenizer(), max_length=100).counts() == {}
    assert tokenize_row(parts, make_tokenizer()) == tokenize_row(TALK, make_tokenizer())


@pytest.mark.parametrize(
    "columns",
    [{"prompt_ids": [1]}, {"chosen_ids": [1]}, {"prompt_ids": [1], "chosen_ids": [1], "completion_ids": [1]}],
)
def test_ids_come_all_together_or_not_at_all(columns):
    with pytest.raises(DataError, match="which have prompt_ids, chosen_ids, rejected_ids"):
        validate(Dataset.from_list([{**ROW, **columns}]))


def test_what_the_template_said_is_told():
    tokenizer = make_tokenizer("{{ raise_exception('only one system message, please') }}")
    report = validate(Dataset.from_list([TALK]), tokenizer=tokenizer, max_length=100)
    assert "The first said: only one system message, please." in report.message()


def test_a_missing_template_is_no_fault_of_the_rows():
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        validate(Dataset.from_list([TALK]), tokenizer=make_tokenizer(None), max_length=100)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "~nosuchuser/a.jsonl"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(DataError, match="cannot be opened"):
        load_preferences(name)


def test_a_folder_with_all_the_world_in_it_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.data.load.MAX_ENTRIES", 3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes(lines(ROW))
    with pytest.raises(DataError, match="more than 3 files and folders lie below this folder"):
        load_preferences(str(tmp_path))
    assert len(load_preferences(str(tmp_path / "a"))) == 1


def test_a_folder_that_was_not_saved_to_its_end(tmp_path):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="saved: could not be read as a save_to_disk folder"):
        load_preferences(str(tmp_path / "saved"))
