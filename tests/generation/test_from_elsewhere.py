"""Samples of a user's file, and of vLLM's stand-in."""

from __future__ import annotations

import json
import sys

import pytest

from prefopt.generation.from_file import FileGenerator
from prefopt.generation.prompts import prompt_ids
from prefopt.generation.samples import PromptRow, SamplingSettings, read_samples, sample_seed
from prefopt.generation.stage import sample_to_file
from prefopt.generation.vllm import VllmGenerator
from prefopt.safety.errors import UsageError
from tests.generation import stand_in_vllm
from tests.tiny import make_tokenizer

CHATS = [PromptRow([{"role": "user", "content": text}]) for text in ("a", "b", "c", "d")]
SETTINGS = SamplingSettings(samples=2, max_new_tokens=7, stop=("END",), top_p=0.9, seed=4)


@pytest.fixture
def samples(tmp_path):
    """Two samples and one more for a, one for c, none for b and d; one of another prompt."""
    rows = [(CHATS[0], "A0"), (CHATS[2], "C0"), (CHATS[0], "A1"), (PromptRow("other"), "X"), (CHATS[0], "A2")]
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"prompt": row.prompt, "completion": text}) + "\n" for row, text in rows))
    return path


def test_samples_of_a_file_are_given_out_by_prompt(samples, tmp_path):
    source = FileGenerator(samples)
    groups = list(source.sample(CHATS, SETTINGS, 2))
    assert [[sample.completion for sample in group] for group in groups] == [["A0", "A1"], [], ["C0"], []]
    assert [(s.index, s.round, s.model) for s in groups[0]] == [
        (0, 2, "file:theirs.jsonl"),
        (1, 2, "file:theirs.jsonl"),
    ]
    coverage = source.coverage(CHATS, SETTINGS, 2)
    assert coverage.missing == (CHATS[1].id, CHATS[3].id)
    assert (coverage.short, coverage.unused) == ((CHATS[2].id,), 2)
    assert f"2 prompts without a sample ({CHATS[1].id}, {CHATS[3].id})" in str(coverage)
    out = tmp_path / "samples.jsonl"
    for _ in range(2):  # a file that was begun is copied anew
        sample_to_file(source, CHATS, SETTINGS, out, 2)
        assert [sample.completion for sample in read_samples(out)] == ["A0", "A1", "C0"]


def test_a_file_of_other_prompts_is_refused(samples):
    with pytest.raises(UsageError, match="no sample for any of the 1 prompts"):
        FileGenerator(samples).coverage([PromptRow("elsewhere")], SETTINGS)


def test_samples_of_other_rounds_are_left_out(tmp_path):
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "completion": str(n), "round": n}) + "\n" for n in (1, 2, 0)))
    (group,) = FileGenerator(path).sample([PromptRow("a")], SamplingSettings(samples=5), 2)
    assert [sample.completion for sample in group] == ["2", "0"]


def test_vllm_gets_the_tokens_of_training_and_a_seed_for_each_sample(monkeypatch, tmp_path):
    engines = stand_in_vllm.install(monkeypatch)
    tokenizer = make_tokenizer()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 12, "rank_pattern": {"q_proj": 40}}')
    generator = VllmGenerator("name", tokenizer, adapter=tmp_path / "lora", gpu_memory_utilization=0.5)
    generator.chunk_prompts = 3
    groups = list(generator.sample(CHATS, SETTINGS, 1))
    (engine,) = engines
    assert engine.options == {
        "model": "name", "enable_lora": True, "gpu_memory_utilization": 0.5, "max_lora_rank": 64,
    }  # fmt: skip
    assert [len(call[0]) for call in engine.calls] == [6, 2]
    prompts, parameters, adapter = engine.calls[0]
    assert [p["prompt_token_ids"] for p in prompts] == [prompt_ids(row, tokenizer) for row in CHATS[:3] for _ in "01"]
    assert vars(parameters[1]) == {
        "seed": sample_seed(4, 1, CHATS[0].id, 1), "temperature": 1.0, "top_p": 0.9, "top_k": -1, "max_tokens": 7,
        "stop": ["END"],
    }  # fmt: skip
    assert adapter.path == str(tmp_path / "lora")
    sample = groups[0][1]
    assert (sample.completion, sample.finished, sample.token_count) == (f"{sample.seed} ", False, 2)
    generator.close()


def test_vllm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"prefopt-trainer\[vllm\]"):
        VllmGenerator("name", make_tokenizer())
