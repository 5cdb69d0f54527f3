"""Samples from a server: what is sent, and that no failure of a server loses or doubles a sample."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from prefopt.generation.prompts import prompt_ids
from prefopt.generation.samples import PromptRow, SamplingSettings, read_samples, sample_seed
from prefopt.generation.stage import sample_to_file
from prefopt.safety.errors import UsageError
from tests.generation.stand_in import completion_for, running
from tests.tiny import THINKING, make_tokenizer

pytest.importorskip("httpx")
pytest.importorskip("tenacity")

from prefopt.generation.endpoint import Client, Endpoint, ServerError, read_completion
from prefopt.generation.server import ServerGenerator

PROMPTS = [PromptRow([{"role": "user", "content": f"Question {number}"}]) for number in range(6)]
SETTINGS = SamplingSettings(samples=4, temperature=0.7, top_p=0.9, max_new_tokens=20, stop=("END",), seed=3)


@pytest.fixture
def server():
    with running() as stand_in:
        yield stand_in


def generator(server: Any, **options: Any) -> ServerGenerator:
    endpoint = Endpoint(server.url, concurrency=5, timeout=2.0, first_wait=0.01, attempts=options.pop("attempts", 8))
    return ServerGenerator(endpoint, options.pop("model", "tiny"), **options)


def expected_texts(prompts: Any = PROMPTS, round_number: int = 1) -> list[str]:
    return [
        f"{row.prompt[-1]['content']} / {sample_seed(3, round_number, row.id, index)}"
        for row in prompts
        for index in range(4)
    ]


def drawn(of: ServerGenerator, prompts: Any = PROMPTS, settings: SamplingSettings = SETTINGS) -> list[Any]:
    return [sample for group in of.sample(prompts, settings, 1) for sample in group]


def test_each_sample_is_a_request_with_its_own_seed(server):
    server.pause = 0.1
    samples = drawn(generator(server))
    assert [sample.completion for sample in samples] == expected_texts()
    assert [(s.prompt_id, s.index) for s in samples] == [(row.id, i) for row in PROMPTS for i in range(4)]
    assert all(sample.finished == (sample.seed % 5 != 0) for sample in samples)
    assert {sample.finished for sample in samples} == {True, False}
    assert samples[0].token_count == len(samples[0].completion)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert sorted(body) == ["max_tokens", "messages", "model", "seed", "stop", "temperature", "top_p"]
    assert {b["seed"] for _, b in server.requests} == {sample.seed for sample in samples}
    assert len(server.requests) == 24
    assert 1 < server.most_at_once <= 5


@pytest.mark.parametrize("seed", range(3))
def test_failures_cost_retries_and_messages_and_no_sample(server, seed):
    chance = random.Random(seed)
    ways = [429, 500, 503, "close", "cut", "broken", "empty", "slow"]
    plans: dict[int, list[Any]] = {}

    def fail(body: Any, earlier: int) -> Any:
        plan = plans.setdefault(body["seed"], [chance.choice(ways) for _ in range(chance.randrange(3))])
        return plan[earlier] if earlier < len(plan) else None

    server.fail = fail
    said: list[str] = []
    samples = drawn(generator(server, say=said.append))
    assert [sample.completion for sample in samples] == expected_texts()
    failures = sum(len(plan) for plan in plans.values())
    assert failures > 5
    assert len(said) >= failures  # a busy machine may be too slow for an answer of its own
    assert len(server.requests) == 24 + len(said)
    assert any("attempt 1 of 8 failed" in line for line in said)


def test_a_server_that_stays_broken_ends_the_run_with_what_there_is(server, tmp_path):
    broken = sample_seed(3, 1, PROMPTS[3].id, 1)
    server.fail = lambda body, earlier: 500 if body["seed"] == broken else None
    path = tmp_path / "samples.jsonl"
    with pytest.raises(ServerError, match="3 attempts failed, the last one with: status 500"):
        sample_to_file(generator(server, attempts=3), PROMPTS, SETTINGS, path, 1)
    assert [sample.completion for sample in read_samples(path)] == expected_texts()[:12]
    server.fail = lambda body, earlier: None
    before = len(server.requests)
    sample_to_file(generator(server), PROMPTS, SETTINGS, path, 1)
    assert [sample.completion for sample in read_samples(path)] == expected_texts()
    assert len(server.requests) - before == 12


def test_a_refusal_is_not_repeated_and_shows_no_key(server, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-very-secret-key")
    server.fail = lambda body, earlier: 400
    endpoint = Endpoint(server.url, key_variable="MY_KEY")
    of = ServerGenerator(endpoint, "tiny")
    with pytest.raises(UsageError, match=r"refused the request \(status 400\)") as error:
        drawn(of, PROMPTS[:1])
    assert server.headers["Authorization"] == "Bearer sk-very-secret-key"
    assert "sk-very" not in str(error.value)
    assert len(server.requests) <= 4
    server.fail = lambda body, earlier: None
    sample_to_file(of, PROMPTS, SETTINGS, tmp_path / "samples.jsonl", 1)
    assert "sk-very" not in (tmp_path / "samples.jsonl").read_text()


@pytest.mark.parametrize("template", [None, THINKING])
def test_tokens_that_are_sent_are_those_of_training(server, template):
    tokenizer = make_tokenizer() if template is None else make_tokenizer(template)
    prompts = [*PROMPTS[:2], PromptRow("Plain text")]
    drawn(generator(server, tokenizer=tokenizer, send="tokens"), prompts)
    sent = {tuple(body["prompt"]) for path, body in server.requests if path == "/v1/completions"}
    assert sent == {tuple(prompt_ids(row, tokenizer)) for row in prompts}


def test_another_template_at_the_server_is_noticed(server):
    tokenizer, theirs = make_tokenizer(THINKING), make_tokenizer()

    def count(of: Any) -> Any:
        return lambda body: len(of.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"])

    server.prompt_tokens = count(tokenizer)
    assert len(drawn(generator(server, tokenizer=tokenizer))) == 24
    server.prompt_tokens = count(theirs)
    with pytest.raises(UsageError, match=r"tokens in training and \d+ at the server"):
        drawn(generator(server, tokenizer=tokenizer))


def test_plain_text_goes_to_completions_and_tools_to_the_template(server):
    tools = [{"type": "function", "function": {"name": "find"}}]
    prompts = [PromptRow("Once upon"), dataclasses.replace(PROMPTS[0], columns={"tools": tools, "answer": "5"})]
    samples = drawn(generator(server, extra={"top_k": 5}), prompts)
    text, chat = server.requests[0], server.requests[-1]
    assert (text[0], text[1]["prompt"], text[1]["top_k"]) == ("/v1/completions", "Once upon", 5)
    assert (chat[0], chat[1]["tools"], "answer" in chat[1]) == ("/v1/chat/completions", tools, False)
    assert samples[0].completion == completion_for({**text[1], "seed": samples[0].seed})


def test_arguments_of_the_template_are_sent_and_a_rows_own_take_precedence(server):
    own = dataclasses.replace(PROMPTS[1], columns={"chat_template_kwargs": {"thinking": True}})
    arguments = {"thinking": False, "date": "today"}
    drawn(generator(server, template_arguments=arguments), [PROMPTS[0], own, PromptRow("Plain text")])
    sent = {json.dumps(body.get("chat_template_kwargs")) for _, body in server.requests}
    assert sent == {json.dumps(arguments), json.dumps({**arguments, "thinking": True}), "null"}


def test_a_stop_text_that_a_server_leaves_is_cut(server):
    seed = sample_seed(3, 1, PROMPTS[0].id, 0)
    stop = f" {str(seed)[:3]}"
    settings = dataclasses.replace(SETTINGS, samples=1, stop=(stop,))
    (sample,) = drawn(generator(server), PROMPTS[:1], settings)
    assert sample.completion == "Question 0 /"


def test_adapters_are_loaded_into_a_running_server(server, tmp_path):
    of = generator(server, model="base")
    for number in (1, 2, 2):
        of.load_adapter(f"round-{number}", tmp_path / str(number))
        assert {sample.model for sample in drawn(of)} == {f"round-{number}"}
    assert server.adapters == {f"round-{n}": str(tmp_path / str(n)) for n in (1, 2)}
    assert server.requests[-1][1]["model"] == "round-2"
    of.unload_adapter("round-2", "base")
    assert list(server.adapters) == ["round-1"]
    assert drawn(of)[0].model == "base"


@pytest.mark.parametrize(
    ("reason", "finished"), [("stop", True), (None, True), ("length", False), ("content_filter", False)]
)
def test_a_completion_that_the_server_cut_is_not_finished(reason, finished):
    reply = {"choices": [{"message": {"content": "half an"}, "finish_reason": reason}]}
    assert read_completion(json.dumps(reply)).finished is finished


def test_tokens_need_a_tokenizer_and_addresses_a_scheme(server):
    with pytest.raises(UsageError, match="tokenizer is needed"):
        generator(server, send="tokens")
    with pytest.raises(UsageError, match="begins with http"):
        Client(Endpoint("localhost:8000"))
