"""Rows of every kind, in files of every kind: a report, our own error with a place in it, or a row that trains."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data import (
    DataError,
    clean,
    load_preferences,
    normalise,
    parse_columns,
    parse_sources,
    rename_columns,
    validate,
)
from tests.fuzz.hostile import NASTY, TEXTS, examples, no_hang, rows
from tests.fuzz.training import TOKENIZER, train_on

PLACES = ("opened", "sources", "row", "column", "line", "file", "folder", "source", "split", "--")


@contextlib.contextmanager
def our_errors():
    """Passes over a `DataError` that says where it is, and what to do; nothing else gets through."""
    try:
        yield
    except DataError as error:
        message = str(error)
        assert any(place in message.lower() for place in PLACES), message
        assert len(message) < 4000
        message.encode()


@given(rows(), st.sampled_from([2, 5, 20, 100, 5000]), st.sampled_from(["keep_start", "keep_end"]))
@examples(4)
def test_rows_are_reported_or_train(tmp_path_factory, given_rows, max_length, mode):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in given_rows))
    with no_hang(), our_errors():
        dataset = normalise(load_preferences(str(path)))
        report = validate(dataset, tokenizer=TOKENIZER, max_length=max_length if mode == "keep_start" else None)
        assert report.ok == (not report.bad_rows)
        report.message().encode()
        if len(report.bad_rows) < report.total:
            kept = clean(dataset, report, "drop", path.with_name("dropped.jsonl"))
            train_on(kept, max_length, mode)


# ---- files --------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "Why?", "chosen": "Because é.", "rejected": "No\n👍"},
    {"prompt": "b", "chosen": "c", "rejected": "d"},
]


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


CONTENTS = {
    ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": 'prompt,chosen,rejected\n"Why?","Because é.","No"\nb,c,d\n'.encode(),
    ".parquet": _parquet(),
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's ending and its bytes: good ones, changed here and there, or in another encoding, or none at all."""
    ending = draw(st.sampled_from([*CONTENTS]))
    raw = CONTENTS[draw(st.sampled_from([ending, ending, ending, *CONTENTS]))]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        change = draw(st.sampled_from(["cut", "insert", "flip", "repeat", "encode"]))
        if change == "cut":
            raw = raw[:at]
        elif change == "insert":
            raw = (
                raw[:at] + draw(st.binary(max_size=6) | st.sampled_from([b"\0", b'"', b"\n", b"[" * 2000])) + raw[at:]
            )
        elif change == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
        elif change == "repeat":
            raw = raw[:at] + raw
        elif change == "encode":
            name = draw(st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"]))
            raw = raw.decode("utf-8", "replace").encode(name, "replace")
    if draw(st.integers(0, 3)) == 0:
        ending, raw = ending + ".gz", gzip.compress(raw)
        raw = raw[: draw(st.sampled_from([len(raw), len(raw) - 5, len(raw) // 2, 3]))]
    return ending, raw


@given(files())
@examples(3)
def test_files_are_read_or_refused_by_name(tmp_path_factory, file):
    ending, raw = file
    path = tmp_path_factory.mktemp("files") / f"rows{ending}"
    path.write_bytes(raw)
    with no_hang(), our_errors():
        dataset = normalise(load_preferences(str(path)))
        report = validate(dataset, tokenizer=TOKENIZER, max_length=100)
        if report.ok:
            train_on(dataset, 100)


VALUES = [
    pa.array([b"a", b"b"]), pa.array([1, 2]), pa.array([1.5, None]), pa.nulls(2), pa.array([True, False]),
    pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"]).dictionary_encode(), pa.array(["x", None]),
    pa.array([0, 1], pa.timestamp("us")), pa.array([0, 1], pa.duration("s")), pa.array([1, 2], pa.decimal128(10, 2)),
    pa.array([[1], [2]]), pa.array([["a"], []]), pa.array([{"a": 1}, {"a": 2}]), pa.array([1.0, 2.0], pa.float16()),
    pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), pa.array([b"ab", b"cd"], pa.binary(2)),
    pa.array([[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]),
]  # fmt: skip


@given(
    st.lists(st.sampled_from(VALUES), min_size=3, max_size=3),
    st.sampled_from(
        [("prompt", "chosen", "rejected"), ("prompt", "completion", "label"), ("prompt", "prompt", "label")]
    ),
    st.integers(0, 2),
)
@examples(2)
def test_parquet_of_any_type(tmp_path_factory, values, names, length):
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([value.slice(0, length) for value in values], [*names]), path)
    with no_hang(), our_errors():
        dataset = normalise(load_preferences(str(path)))
        if validate(dataset, tokenizer=TOKENIZER, max_length=100).ok:
            train_on(dataset, 100)


@pytest.mark.parametrize("make", ["folder", "folder of text", "broken save", "link to itself", "unreadable"])
def test_what_is_no_file(tmp_path, make):
    path = tmp_path / "data.jsonl"
    if make == "link to itself":
        path.symlink_to(path)
    elif make == "unreadable":
        path.write_text("{}")
        path.chmod(0)
    else:
        path.mkdir()
        (path / "a.txt").write_text("hello") if make == "folder of text" else None
        (path / "state.json").write_text("{") if make == "broken save" else None
    with pytest.raises(DataError, match=r"data\.jsonl|column"):
        normalise(load_preferences(str(path)))


# ---- names and options --------------------------------------------------------------------------------------------


@given(
    st.one_of(
        TEXTS, st.text(alphabet="/.~:-ab\0", max_size=12), st.sampled_from(["~nobody/x", "a" * 5000, "/", "C:\\x"])
    )
)
@examples(2)
def test_any_name_is_opened_or_refused(name):
    with no_hang(), our_errors():
        load_preferences(name)


@given(st.lists(TEXTS | st.text(alphabet="promtchsen=_ ,", max_size=20), max_size=4))
@examples(2)
def test_any_column_mapping(words):
    with our_errors():
        mapping = parse_columns(words)
        normalise(rename_columns(_pairs(), mapping))


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "label", "completion", "messages", *NASTY[:6]]),
        st.sampled_from(["a", "prompt", "chosen", "rejected", "b", "prompt_original", *NASTY[:6]]),
        max_size=4,
    )
)
@examples(2)
def test_any_renaming(mapping):
    with our_errors():
        normalise(rename_columns(_pairs(), mapping))


def _pairs():
    return load_preferences(str(Path(__file__).parent / "columns.jsonl"))


@given(st.text(alphabet="ab.:,07-+eninf ", max_size=20) | TEXTS)
@examples(5)
def test_any_mixture(text):
    with our_errors():
        sources = parse_sources(text)
        assert sources
        assert all(weight is None or 0 < weight < float("inf") for _, weight in sources)
