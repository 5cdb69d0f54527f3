"""Loading: every file format, saved folders, renamed columns, and messages about files that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt.data import DataError, load_preferences, normalise, parse_columns, read_preferences, validate

ROWS = [
    {"prompt": "How does a bridge work?", "chosen": "It carries loads.", "rejected": "No idea."},
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Rome."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    plain = folder / name.removesuffix(".gz")
    if ".jsonl" in name:
        plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif ".json" in name:
        plain.write_text(json.dumps(ROWS, indent=1))
    elif ".csv" in name:
        Dataset.from_list(ROWS).to_csv(str(plain))
    else:
        Dataset.from_list(ROWS).to_parquet(str(plain))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, ending: str, compression: str, streaming: bool) -> None:
    dataset = load_preferences(str(_write(tmp_path, f"pairs{ending}{compression}")), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == ROWS


def test_a_saved_dict_takes_the_split_and_lists_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(str(folder))
    assert len(load_preferences(str(folder), split="test")) == 1
    assert list(load_preferences(str(folder), streaming=True)) == ROWS
    with pytest.raises(DataError, match=r"no split 'tset'; this folder holds 'train', 'test'.* Did you mean 'test'"):
        load_preferences(str(folder), split="tset")


def test_a_saved_dataset_is_its_only_split(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(str(folder))
    assert list(load_preferences(str(folder))) == ROWS
    with pytest.raises(DataError, match="holds a single dataset, not a split 'test'"):
        load_preferences(str(folder), split="test")


def test_a_file_holds_the_train_split_and_its_slices(tmp_path: Path) -> None:
    path = _write(tmp_path, "pairs.jsonl")
    assert list(load_preferences(str(path), split="train[:1]")) == ROWS[:1]
    with pytest.raises(DataError, match=r"only the split 'train', but 'test' was requested"):
        load_preferences(str(path), split="test")


def test_a_missing_file_suggests_near_names(tmp_path: Path) -> None:
    _write(tmp_path, "pairs.jsonl")
    with pytest.raises(DataError, match=r"No file at .*pears\.jsonl.* Did you mean 'pairs\.jsonl'\?"):
        load_preferences(str(tmp_path / "pears.jsonl"))
    with pytest.raises(DataError, match=r"Data files there: pairs\.jsonl"):
        load_preferences(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match="the nearest that does is"):
        load_preferences(str(tmp_path / "a" / "b" / "zzz.csv"))


WORDS = "word " * 1000


def _late(folder: Path, chat: bool, last: dict[str, object]) -> str:
    """More than 10 MB of rows, the last of which has what none before it has."""
    if chat:
        row = {name: [{"role": "assistant", "content": WORDS}] for name in ("chosen", "rejected")}
        row["prompt"] = [{"role": "user", "content": "Say it."}]
    else:
        row = {"prompt": "Say it.", "chosen": WORDS + "a", "rejected": WORDS, "comment": None, "score": 1, "tags": []}
    path = folder / "late.jsonl"
    path.write_text((json.dumps(row) + "\n") * 1100 + json.dumps({**row, **last}) + "\n")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_empty_for_ten_megabytes_are_read(tmp_path: Path, streaming: bool) -> None:
    last = {"prompt": "The end", "comment": "by hand", "score": 0.5, "tags": ["x"]}
    name = _late(tmp_path, False, last)
    rows = list(load_preferences(name, streaming=streaming))
    assert len(rows) == 1101
    assert rows[0]["comment"] is None
    assert {column: rows[-1][column] for column in last} == last
    assert [row["prompt"] for row in load_preferences(name, split="train[-2:]")] == ["Say it.", "The end"]


@pytest.mark.parametrize("streaming", [False, True])
def test_tool_calls_that_come_late_are_read(tmp_path: Path, streaming: bool) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    last = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = list(load_preferences(_late(tmp_path, True, {"chosen": last}), streaming=streaming))
    assert rows[-1]["chosen"] == last
    assert rows[0]["chosen"][0]["tool_calls"] is None


def test_a_column_of_numbers_and_texts_keeps_both(tmp_path: Path) -> None:
    rows = list(load_preferences(_late(tmp_path, False, {"chosen": 42, "score": "high"})))
    assert (rows[0]["score"], rows[-1]["score"]) == (1, "high")
    assert (rows[0]["chosen"], rows[-1]["chosen"]) == (WORDS + "a", 42)
    report = validate(normalise(load_preferences(str(tmp_path / "late.jsonl")), say=lambda line: None))
    assert [problem.rows for problem in report.problems if problem.kind == "wrong type: chosen"] == [[1100]]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_beyond_64_bits_are_floats_and_an_array_may_begin_with_a_mark(tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt": "a", "id": 2**70}, {"prompt": "b", "id": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    numbers = [row["id"] for row in load_preferences(str(tmp_path / "a.jsonl"), streaming=streaming)]
    assert numbers == [2.0**70, 1.0]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    assert list(load_preferences(str(tmp_path / "a.json"), streaming=streaming)) == ROWS


def test_a_stream_of_a_slice_is_that_slice(tmp_path: Path) -> None:
    path = _write(tmp_path, "pairs.jsonl")
    assert list(load_preferences(str(path), split="train[1:]", streaming=True)) == ROWS[1:]


def test_lines_are_not_read_before_they_failed_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.data.load.raise_for_broken_json", lambda path: pytest.fail("was looked through"))
    assert list(load_preferences(str(_write(tmp_path, "pairs.jsonl")))) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, ending: str, streaming: bool) -> None:
    pairs = [("2024-01-01", "2024-02-01"), ("2024-03-01T10:00:00", "2024-05-01")]
    if ending == ".csv":
        pairs = [("42", "NA"), ("true", "007"), ("null", "2024-01-01"), ("1e5", "nan")]
    rows = [{"prompt": f"p{n}", "chosen": good, "rejected": bad} for n, (good, bad) in enumerate(pairs)]
    path = tmp_path / f"rows{ending}"
    if ending == ".csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        text = json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert list(load_preferences(str(path), streaming=streaming)) == rows


def test_what_is_mapped_to_a_text_is_text_in_csv_and_numbers_stay_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("ask,chosen,rejected,weight,margin\n12,a,b,0.5,NA\n13,c,d,1,2\n")
    rows = list(read_preferences(str(path), columns={"prompt": "ask"}, say=lambda line: None))
    assert [row["prompt"] for row in rows] == ["12", "13"]
    assert [(row["weight"], row["margin"]) for row in rows] == [(0.5, None), (1.0, 2.0)]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "dates.jsonl"
    for day in ("2024-01-01", "2024-01-02"):
        path.write_text(json.dumps({"prompt": "p", "chosen": day, "rejected": "2020-01-01"}))
        assert load_preferences(str(path))[0]["chosen"] == day


def test_an_unreachable_hub_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'owner/pairs' is not a local file or folder, and .* Hub .*Couldn't"):
        load_preferences("owner/pairs")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_broken_json_line_is_named(tmp_path: Path, streaming: bool, compression: str) -> None:
    text = f'{json.dumps(ROWS[0])}\n\n{{"prompt": "a", "chosen":\n{json.dumps(ROWS[1])}\n'.encode()
    path = tmp_path / f"broken.jsonl{compression}"
    path.write_bytes(gzip.compress(text) if compression else text)
    with pytest.raises(DataError, match=r"broken\.jsonl.*, line 3: not valid JSON .* repair or delete this line"):
        load_preferences(str(path), streaming=streaming)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.jsonl", b'{"a": 1}\n[1, 2]\n', r"line 2: a JSON list where an object"),
        ("array.json", b'[{"a": 1},\n {"a": }]', r"array\.json, line 2: not valid JSON"),
        ("latin.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', r"line 2: not valid JSON \(not UTF-8"),
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "the file is empty"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "ends early or is damaged"),
        ("not.parquet", b"PAR1 nothing", r"not\.parquet: could not be read as parquet"),
        ("notes.docx", b"x", "ending is not a known format"),
    ],
)
def test_unreadable_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_preferences(str(tmp_path / name))


def test_columns_are_renamed_and_displaced_ones_kept(tmp_path: Path) -> None:
    path = _write(tmp_path, "pairs.jsonl")
    dataset = load_preferences(str(path), columns={"chosen": "rejected", "rejected": "chosen"})
    assert dataset[0] == {**ROWS[0], "chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}
    displaced = load_preferences(str(path), columns={"prompt": "chosen"})
    assert set(displaced.column_names) == {"prompt", "prompt_original", "rejected"}


def test_a_mapping_to_an_absent_column_lists_the_columns(tmp_path: Path) -> None:
    path = str(_write(tmp_path, "pairs.jsonl"))
    with pytest.raises(DataError, match=r"no column 'promt'\. Did you mean 'prompt'\? Its columns: prompt, chosen"):
        load_preferences(path, columns={"prompt": "promt"})
    with pytest.raises(DataError, match=r"Did you mean question=prompt\?|Our name comes first"):
        load_preferences(path, columns={"prompt": "question"})
    with pytest.raises(DataError, match="'chosen' is mapped to more than one"):
        load_preferences(path, columns={"prompt": "chosen", "rejected": "chosen"})


def test_parse_columns_reads_pairs_and_refuses_the_rest() -> None:
    assert parse_columns(["prompt=question", "chosen=a"]) == {"prompt": "question", "chosen": "a"}
    assert parse_columns(None) == {}
    with pytest.raises(DataError, match="'prompt' is not of the form OURS=THEIRS"):
        parse_columns(["prompt"])
    with pytest.raises(DataError, match="'prompt' is given twice"):
        parse_columns("prompt=a prompt=b")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.csv", "prompt;chosen;rejected"),
        ("a.csv", "prompt\tchosen\trejected"),
        ("a.tsv", "prompt\tchosen\trejected"),
    ],
)
def test_columns_may_be_separated_otherwise(tmp_path: Path, name: str, header: str, streaming: bool) -> None:
    separator = header[len("prompt")]
    path = tmp_path / name
    path.write_text(f"{header}\nOne, or two?{separator}42{separator}NA\n")
    (row,) = load_preferences(str(path), streaming=streaming)
    assert row == {"prompt": "One, or two?", "chosen": "42", "rejected": "NA"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", ["Say hi,Hi, there,No.", "Say hi,Hi.,No.,\nSay bye,Bye.,No.,"])
def test_cells_beyond_the_header_move_no_text_to_another_column(tmp_path: Path, rows: str, streaming: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,chosen,rejected\n{rows}\n")
    with pytest.raises(DataError, match="its first row has more cells than the header"):
        load_preferences(str(path), streaming=streaming)


def test_a_line_with_more_cells_than_others_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nSay hi,Hi.,No.\nSay hi,Hi, there,No.\n")
    with pytest.raises(DataError, match=r"line 3 has 4 cells, and those before 3\. Put texts"):
        load_preferences(str(path))


def test_a_column_that_pandas_wrote_for_its_index_is_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("__index_level_0__,prompt\n0,Say hi\n")
    assert list(load_preferences(str(path))) == [{"__index_level_0__": 0, "prompt": "Say hi"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_blanks_around_names_of_columns_are_not_part_of_them(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt, chosen, rejected\nOne?, 42, NA\n")
    (row,) = load_preferences(str(path), streaming=streaming)
    assert row == {"prompt": "One?", "chosen": " 42", "rejected": " NA"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": [{"prompt": "a", "chosen": "b"}]}, r"rows inside \(data\).*jq \.data all\.json"),
        ({"prompt": {"0": "a", "1": "b"}, "chosen": {"0": "c", "1": "d"}}, 'orient="records"'),
        ({"prompt": ["a", "b"], "chosen": ["c", "d"]}, 'orient="records"'),
        ({"columns": ["prompt"], "index": [0], "data": [["a"]]}, 'orient="records"'),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_with_all_rows_in_one_object(tmp_path: Path, value: Any, message: str, indent: int | None) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps(value, indent=indent))
    with pytest.raises(DataError, match=message):
        load_preferences(str(path))


def test_a_file_with_one_row_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    for row in (
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]},
        {"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 2}]},
        {"messages": [{"from": "human", "value": "a"}], "rejected_response": "b"},
    ):
        path.write_text(json.dumps(row))
        assert load_preferences(str(path))[0] == row


def test_an_arrow_file_and_files_of_other_columns(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert load_preferences(str(file))[0] == {"prompt": "a"}
    (tmp_path / "several").mkdir()
    for name, row in (("a", {"prompt": "a"}), ("b", {"prompt": "b", "more": 1})):
        (tmp_path / "several" / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="they differ in their columns"):
        load_preferences(str(tmp_path / "several"))
