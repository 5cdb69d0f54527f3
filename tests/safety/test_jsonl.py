import pytest

from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter, read_jsonl


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with JsonlWriter(path) as file:
        file.write([{"a": 1}, {"a": "é\n"}])
        file.write([])
        assert list(read_jsonl(path)) == [{"a": 1}, {"a": "é\n"}]  # on the disk before the file is closed
    with JsonlWriter(path) as file:
        file.write([{"a": 3}])
    assert [row["a"] for row in read_jsonl(path)] == [1, "é\n", 3]


@pytest.mark.parametrize("cut", [1, 5, 70000])
def test_a_line_that_was_cut_off_is_left_out_and_written_again(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    with JsonlWriter(path) as file:
        file.write([{"a": 1}, {"a": "x" * 100000}])
    path.write_bytes(path.read_bytes()[: -cut - 1])
    assert [row["a"] for row in read_jsonl(path)] == [1]
    with JsonlWriter(path) as file:
        file.write([{"a": 2}])
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}')
    assert list(read_jsonl(path)) == [{"a": 1}]
    with JsonlWriter(path) as file:
        file.write([{"a": 2}])
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("line", "what"), [('{"a": ', "line 2: not valid JSON"), ("[1]", "line 2: a JSON list")])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line, what):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(UsageError, match=what):
        list(read_jsonl(path))
