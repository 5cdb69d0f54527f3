import json

import pytest

from prefopt.generation.samples import Sample, SamplingSettings, by_prompt, prompt_id, read_samples, sample_seed
from prefopt.safety.errors import UsageError
from prefopt.safety.jsonl import JsonlWriter

CHAT = [{"role": "user", "content": "2 + 2"}]


def test_samples_are_read_as_they_were_written(tmp_path):
    written = [Sample(prompt_id(CHAT), CHAT, i, str(i), 3, i == 0, 1, 5, {"top_p": 0.5}, "hash") for i in range(2)]
    with JsonlWriter(tmp_path / "samples.jsonl") as file:
        file.write(sample.line() for sample in written)
    assert list(read_samples(tmp_path / "samples.jsonl")) == written


def test_prompt_and_completion_are_enough(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ["aX", "bY", "aZ"]))
    groups = by_prompt(read_samples(path))
    assert [[(s.index, s.completion) for s in group] for group in groups.values()] == [
        [(0, "X"), (1, "Z")],
        [(0, "Y")],
    ]
    assert list(groups) == [prompt_id("a"), prompt_id("b")]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a"}, "has no completion"),
        ({"prompt": "a", "completion": 3}, "must be a text, not a int"),
        ({"schema": "prefopt.samples/9", "prompt": "a", "completion": "b"}, "reads prefopt.samples/1"),
    ],
)
def test_rows_that_are_no_samples_are_named(tmp_path, row, what):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=f"own.jsonl, object 1.*{what}"):
        list(read_samples(path))


def test_ids_and_seeds_depend_on_nothing_else():
    # Stored files and resumed runs rely on these numbers.
    assert (prompt_id("2 + 2"), sample_seed(0, 1, "a", 0)) == ("b9de4d25593d93b6", 7355748047970121696)
    assert prompt_id([{"role": "user", "content": "a"}]) == prompt_id([{"content": "a", "role": "user"}])
    assert len({sample_seed(s, r, n, i) for s in (0, 1) for r in (0, 1) for n in "ab" for i in (0, 1)}) == 16
    assert 0 <= sample_seed(0, 1, "a", 0) < 2**63


SAMPLE = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("second", "what"),
    [
        ({"prompt_id": "x", "prompt": "c", "completion": "d"}, "prompt_id 'x' stands for another prompt"),
        ({"prompt_id": "x", "prompt": "a", "completion": "d", "index": 0}, "a second sample with index 0 of prompt x"),
        ({**SAMPLE, "index": -1}, "index must be a whole number of 0 or more, not -1"),
        ({**SAMPLE, "index": 1.5}, "index must be a whole number"),
        ({**SAMPLE, "token_count": "12"}, "token_count must be a whole number"),
        ({**SAMPLE, "finished": "false"}, "finished must be true or false, not 'false'"),
        ({**SAMPLE, "sampling": "greedy"}, "sampling must be an object"),
        ({"prompt": 5, "completion": "b"}, "prompt must be a text, or messages with role and content, not '5'"),
        ({"prompt": [{"from": "human", "value": "Hi"}], "completion": "b"}, "messages with role and content"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, second, what):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt_id": "x", **SAMPLE}, second)))
    with pytest.raises(UsageError, match=f"own.jsonl, object 2: .*{what}"):
        list(read_samples(path))


def test_gaps_of_a_table_get_the_usual_values(tmp_path):
    path = tmp_path / "own.jsonl"
    empty = dict.fromkeys(("prompt_id", "index", "token_count", "finished", "round", "seed", "sampling", "model"))
    path.write_text("".join(json.dumps({**empty, **SAMPLE, **more}) + "\n" for more in ({}, {"index": 3.0})))
    first, second = read_samples(path)
    assert first == Sample(prompt_id("a"), "a", 0, "b", 0, True)
    assert second.index == 3


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_line_ends_and_half_letters_are_read(tmp_path, prefix):
    path, copy = tmp_path / "own.jsonl", tmp_path / "copy.jsonl"
    path.write_bytes(
        prefix + b'{"prompt": "a\\ud83d", "completion": "\\ud83d"}\r\n{"prompt": "b", "completion": "c"}\r\n'
    )
    samples = list(read_samples(path))
    assert [one.completion for one in samples] == ["\ud83d", "c"]
    with JsonlWriter(copy) as file:
        file.write(one.line() for one in samples)
    assert list(read_samples(copy)) == samples


def test_files_that_are_missing_or_an_array_are_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps([SAMPLE]))
    with pytest.raises(UsageError, match="line 1: a JSON list; each line must be an object"):
        list(read_samples(tmp_path / "samples.jsonl"))
    with pytest.raises(UsageError, match=r"no file .*sample.jsonl. Did you mean 'samples.jsonl'"):
        list(read_samples(tmp_path / "sample.jsonl"))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperature": float("nan")}, "temperature must be a number of 0 or more"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"stop": ("END", "")}, "stop has an empty text"),
    ],
)
def test_settings_out_of_range_are_refused(settings, what):
    with pytest.raises(UsageError, match=what):
        SamplingSettings(**settings)
