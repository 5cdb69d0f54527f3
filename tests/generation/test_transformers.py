"""The generator of models in memory: the same samples however they are batched, dealt out or interrupted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import prefopt.generation.decode as decode
from prefopt.data.tokenize import tokenize_row
from prefopt.generation.prompts import Reader, prompt_ids
from prefopt.generation.samples import PromptRow, Sample, SamplingSettings
from prefopt.generation.transformers import TransformersGenerator
from prefopt.safety.errors import UsageError
from tests.processes import torchrun
from tests.tiny import THINKING, make_model, make_tokenizer

WORDS = ["Hello there", "What is the capital of France?", "a", "The quick brown fox jumps over the lazy dog. " * 3]
CHATS = [PromptRow([{"role": "user", "content": words}]) for words in WORDS]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=16)


def ending_often(model: Any) -> Any:
    """A random model ends at one of 400 tokens; with fifty of them rows finish at different lengths."""
    model.generation_config.eos_token_id = list(range(50))
    return model


def drawn(model: Any, prompts: Any = CHATS, settings: SamplingSettings = SETTINGS, **options: Any) -> list[Sample]:
    generator = TransformersGenerator(model, make_tokenizer(), name="tiny", **options)
    return [sample for group in generator.sample(prompts, settings) for sample in group]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt2", "jamba", "mamba", "moe"])
def test_samples_do_not_depend_on_batches_or_on_the_way_through_the_model(architecture, monkeypatch):
    model = ending_often(make_model(architecture))
    expected = drawn(model)
    assert {sample.finished for sample in expected} == {True, False}
    assert len({sample.completion for sample in expected}) > 8
    assert drawn(model, rows_at_once=2, chunk_prompts=1) == expected
    assert drawn(model, CHATS[::-1])[-3:] == expected[:3]
    monkeypatch.setattr(decode, "_takes_positions", lambda model: False)
    assert drawn(model) == expected


def test_rows_of_the_next_prompts_take_the_places_of_finished_ones(monkeypatch):
    model = ending_often(make_model("qwen2"))
    prompts = [PromptRow("The quick brown fox jumps over the lazy dog. " * (1 + n % 3) + str(n)) for n in range(14)]
    alone = drawn(model, prompts, rows_at_once=3, chunk_prompts=1)
    joined: list[int] = []
    join = decode.join
    monkeypatch.setattr(decode, "join", lambda one, other, unused: joined.append(unused) or join(one, other, unused))
    assert drawn(model, prompts, rows_at_once=9) == alone
    assert len(joined) > 2
    assert max(joined) > 0  # padding that nobody needs any more is left out


def test_greedy_samples_are_those_of_generate():
    model, tokenizer = make_model("qwen2"), make_tokenizer()
    settings = SamplingSettings(samples=1, temperature=0, max_new_tokens=12)
    for sample, row in zip(drawn(model, settings=settings), CHATS, strict=True):
        ids = torch.tensor([prompt_ids(row, tokenizer)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = out[0, ids.shape[1] :].tolist()
        assert sample.completion == tokenizer.decode(new, skip_special_tokens=True)
        assert sample.token_count == len(new)


def test_a_sample_has_the_probability_that_the_model_gives_it():
    # First tokens of many samples against the model's own distribution, at the likeliest tokens.
    model, tokenizer = make_model(), make_tokenizer()
    ids = torch.tensor([prompt_ids(CHATS[0], tokenizer)])
    with torch.no_grad():
        probabilities = model(ids).logits[0, -1].softmax(-1)
    settings = SamplingSettings(samples=4000, max_new_tokens=1)
    reader = Reader(tokenizer, [tokenizer.eos_token_id], ())
    counts: dict[str, int] = {}
    for sample in drawn(model, CHATS[:1], settings, rows_at_once=4000):
        counts[sample.completion] = counts.get(sample.completion, 0) + 1
    for token in probabilities.topk(5).indices.tolist():
        share = float(probabilities[token])
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert abs(counts.get(reader.text([token]), 0) - 4000 * share) < 4 * deviation


def test_rounds_and_seeds_draw_other_samples():
    model = make_model()
    generator = TransformersGenerator(model, make_tokenizer())
    first, second = (next(iter(generator.sample(CHATS[:1], SETTINGS, number))) for number in (1, 2))
    assert {s.completion for s in first}.isdisjoint(s.completion for s in second)
    assert first[0].sampling == {
        "samples": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 16, "stop": [],
    }  # fmt: skip
    assert (first[0].round, len(first[0].model)) == (1, 16)


def test_stop_texts_end_a_completion_and_are_not_part_of_it():
    model = make_model()
    free = drawn(model, settings=SamplingSettings(samples=3, max_new_tokens=40))
    stop = free[0].completion[5:7], "zzzz"
    cut = drawn(model, settings=SamplingSettings(samples=3, max_new_tokens=40, stop=stop))
    for before, after in zip(free, cut, strict=True):
        assert after.completion == before.completion.split(stop[0])[0]
        assert after.finished == (before.finished or stop[0] in before.completion)
    assert 0 < cut[0].token_count < 40


def test_prompts_have_the_ids_of_training():
    for tokenizer in (make_tokenizer(), make_tokenizer(THINKING)):
        for prompt in (*(row.prompt for row in CHATS), "Plain text to continue"):
            answer: Any = "So" if isinstance(prompt, str) else [{"role": "assistant", "content": "So"}]
            trained = tokenize_row({"prompt": prompt, "completion": answer}, tokenizer)
            assert prompt_ids(PromptRow(prompt), tokenizer) == trained["prompt_ids"]


def test_a_lora_policy_draws_with_its_adapter():
    model = make_model()
    plain = drawn(model)
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    policy.train()
    names = {TransformersGenerator(policy, make_tokenizer()).name}
    adapted = drawn(policy)
    assert [s.completion for s in adapted] != [s.completion for s in plain]
    assert policy.training
    with policy.disable_adapter():
        assert drawn(policy) == plain
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    assert TransformersGenerator(policy, make_tokenizer()).name not in names


@pytest.mark.parametrize(
    ("row", "settings", "what"),
    [
        (PromptRow(""), SETTINGS, "is empty"),
        (CHATS[3], SamplingSettings(max_new_tokens=600), "more than the model's 512 positions"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(row, settings, what):
    with pytest.raises(UsageError, match=f"{row.id}.*{what}"):
        drawn(make_model(), [row], settings)


def test_messages_need_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        list(TransformersGenerator(make_model(), tokenizer).sample(CHATS, SETTINGS))
    (group,) = TransformersGenerator(make_model(), tokenizer).sample([PromptRow("Hello")], SETTINGS)
    assert len(group) == 3


def test_a_closed_generator_holds_no_model():
    import weakref

    model = make_model()
    model_alive = weakref.ref(model)
    generator = TransformersGenerator(model, make_tokenizer())
    list(generator.sample(CHATS[:1], SETTINGS))
    del model
    generator.close()
    assert model_alive() is None


@pytest.mark.distributed
def test_two_processes_write_the_file_of_one(tmp_path):
    from tests.generation.sampling_processes import write_samples

    write_samples(tmp_path / "one.jsonl")
    torchrun("tests.generation.sampling_processes", str(tmp_path / "two.jsonl"))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    # Resumed by two where one was killed.
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:10]) + lines[10][:20])
    torchrun("tests.generation.sampling_processes", str(tmp_path / "two.jsonl"))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert json.loads(lines[-1])["index"] == 2
