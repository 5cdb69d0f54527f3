"""Sampling into a file: interrupted anywhere it ends with the same bytes, and mixed settings are refused."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from prefopt.generation.samples import PromptRow, Sample, SamplingSettings, prompt_id, read_samples
from prefopt.generation.stage import count_samples, read_prompts, sample_to_file
from prefopt.generation.transformers import TransformersGenerator
from prefopt.safety.errors import UsageError
from tests.tiny import make_model, make_tokenizer

PROMPTS = [PromptRow([{"role": "user", "content": f"{number} + 1"}]) for number in range(5)]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def generator():
    return TransformersGenerator(make_model(), make_tokenizer(), name="tiny", chunk_prompts=2)


def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(generator, tmp_path):
    path = tmp_path / "samples.jsonl"
    progress: list[int] = []
    sample_to_file(generator, PROMPTS, SETTINGS, path, shown=progress.append)
    assert progress == [0, 2, 4, 5]
    whole = path.read_bytes()
    assert [sample.index for sample in read_samples(path)] == [0, 1, 2] * 5
    for length in [0, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 12)]:
        path.write_bytes(whole[:length])
        sample_to_file(generator, PROMPTS, SETTINGS, path)
        assert path.read_bytes() == whole


def test_a_whole_file_is_not_drawn_again(generator, tmp_path):
    path = tmp_path / "samples.jsonl"
    sample_to_file(generator, PROMPTS, SETTINGS, path)
    calls: list[int] = []

    class Counting:
        name, chunk_prompts = generator.name, generator.chunk_prompts

        def sample(self, prompts, settings, round_number=0):
            calls.append(len(prompts))
            yield from ()

    sample_to_file(Counting(), PROMPTS, SETTINGS, path)
    assert calls == [0]


@pytest.mark.parametrize(
    ("settings", "round_number", "what"),
    [
        (dataclasses.replace(SETTINGS, temperature=0.5), 0, "another temperature \\(1.0, now 0.5\\)"),
        (dataclasses.replace(SETTINGS, seed=1), 0, "another seed"),
        (SETTINGS, 2, "another seed|another round"),
    ],
)
def test_other_settings_do_not_continue_a_file(generator, tmp_path, settings, round_number, what):
    path = tmp_path / "samples.jsonl"
    sample_to_file(generator, PROMPTS, SETTINGS, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=what):
        sample_to_file(generator, PROMPTS, settings, path, round_number)
    with pytest.raises(UsageError, match="another prompt than expected"):
        sample_to_file(generator, PROMPTS[::-1], SETTINGS, path)
    assert path.read_bytes() == before


def test_prompts_are_read_once_each(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "a", "answer": 1}, {"prompt": chat}] * 2))
    rows, repeated = read_prompts(path)
    assert (rows, repeated) == ([PromptRow("a", {"answer": 1}), PromptRow(chat)], 2)
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(UsageError, match=r"prompts.jsonl, object 2: prompt must be a text"):
        read_prompts(path)


def test_prompts_are_the_messages_that_training_reads(tmp_path):
    path = tmp_path / "prompts.jsonl"
    talk = [("human", "a"), ("gpt", "b"), ("User", "c")]
    rows = [{"prompt": [{"from": speaker, "value": text} for speaker, text in talk]}]
    rows.append({"prompt": json.dumps([{"role": "user", "content": "d"}])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_prompts(path)[0]
    assert [(one["role"], one["content"]) for one in first.prompt] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert second.prompt == [{"role": "user", "content": "d"}]


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "is the assistant's.*Here .*'b'"),
        ([{"role": "Bob", "content": "a"}], "a role that chat templates do not know"),
        ("  \n", "has no text"),
    ],
)
def test_prompts_that_leave_nothing_to_answer_are_refused(tmp_path, prompt, what):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(UsageError, match=f"object 1: .*{what}"):
        read_prompts(path)


def test_counts_of_samples():
    def one(index: int, completion: str, finished: bool = True) -> Sample:
        return Sample(prompt_id("a"), "a", index, completion, 4, finished)

    counts = count_samples([one(0, "x"), one(1, "x"), one(2, " ", False), one(3, "y")])
    assert dataclasses.asdict(counts) == {
        "prompts": 1, "samples": 4, "cut": 1, "empty": 1, "duplicates": 1, "tokens": 16,
    }  # fmt: skip
    assert counts.mean_tokens == 4


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "2 + 2", "answer": "4"}, "it has the columns question, answer"),
        ({"prompt": [{"role": "user"}]}, "messages with role and content"),
    ],
)
def test_prompts_that_would_be_rendered_empty_are_refused(tmp_path, row, what):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=f"object 1: prompt must be a text.*{what}"):
        read_prompts(path)
