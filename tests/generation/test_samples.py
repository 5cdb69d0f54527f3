import json

import pytest

from prefopt.generation.samples import Sample, by_prompt, prompt_id, read_samples, sample_seed
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
