"""`prefopt sample` from prompts to a file, and its errors in plain words."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.generation.samples import read_samples
from tests.generation.stand_in import running
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chats = [[{"role": "user", "content": text}] for text in ("a", "b", "c", "a")]
    path.write_text("".join(json.dumps({"prompt": chat, "answer": "1"}) + "\n" for chat in chats))
    return str(path)


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sample", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


def test_a_file_of_samples_is_written_and_continued(model, prompts, tmp_path):
    out = tmp_path / "samples.jsonl"
    options = prompts, "--model", model, "--out", out, "--samples", 2, "--max-new-tokens", 5, "--temperature", 0
    status, text = run(*options)
    assert status == 0, text
    assert "1 rows of" in text
    assert "6 samples of 3 prompts, 5.0 tokens on average; 0 finished, 6 cut, 3 duplicates, 0 empty" in text
    whole = out.read_bytes()
    out.write_bytes(whole[:200])
    assert run(*options)[0] == 0
    assert out.read_bytes() == whole
    status, text = run(*options[:-1], 0.5)
    assert status == 1
    assert "was drawn with another temperature (0.0, now 0.5)" in text


def test_prompts_may_be_a_data_set(model, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,answer\nOne,1\nTwo,2\n")
    out = tmp_path / "samples.jsonl"
    status, text = run(path, "--model", model, "--out", out, "--samples", 1, "--max-new-tokens", 2)
    assert status == 0, text
    assert [sample.prompt for sample in read_samples(out)] == ["One", "Two"]


def test_samples_of_another_program_are_taken_in(prompts, tmp_path):
    theirs, out = tmp_path / "theirs.jsonl", tmp_path / "samples.jsonl"
    theirs.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "completion": "A"}) + "\n")
    status, text = run(prompts, "--file", theirs, "--out", out, "--samples", 1)
    assert status == 0, text
    assert "2 prompts without a sample" in text
    assert [sample.completion for sample in read_samples(out)] == ["A"]


def test_a_server_draws_them(prompts, tmp_path):
    pytest.importorskip("tenacity")
    out = tmp_path / "samples.jsonl"
    with running() as server:
        status, text = run(prompts, "--url", server.url, "--served-as", "tiny", "--out", out, "--samples", 2)
    assert status == 0, text
    assert next(sample.completion for sample in read_samples(out)).startswith("a / ")


def test_no_file_that_is_read_is_lost(prompts, tmp_path):
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(json.dumps({"prompt": [{"role": "user", "content": "a"}], "completion": "A", "own": 1}) + "\n")
    for out, what in ((theirs, "is the file that is read"), (tmp_path / "other.jsonl", "object 1 has no prompt")):
        if not out.exists():
            out.write_text('{"mine": 1}\n')
        before = out.read_bytes()
        status, text = run(prompts, "--file", theirs, "--out", out, "--samples", 1)
        assert status == 1
        assert what in text
        assert out.read_bytes() == before
    assert "is the file that is read" in run(prompts, "--out", prompts)[1]
    status, text = run(prompts, "--file", theirs, "--out", tmp_path / "new.jsonl", "--temperature", 0.5)
    assert "--temperature has no effect, since the samples in --file are drawn already" in text


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--url", "http://x/v1", "--vllm"], "choose one"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--url", "http://x/v1", "--send", "bytes", "--served-as", "m"], "must be messages or tokens"),
        (["--url", "http://x/v1"], "--served-as"),
        (["--url", "http://x/v1", "--served-as", "m", "--extra", "[1]"], "must be a JSON object"),
        (["--url", "http://x/v1", "--served-as", "m", "--extra", "{x"], "must be a JSON object"),
        (
            ["--url", "http://x/v1", "--served-as", "m", "--rows", 4],
            "--rows has no effect, since --url names a server",
        ),
        (["--served-as", "m"], "--served-as has no effect, since there is no --url"),
        (["--split", "validation"], "--split validation has no effect"),
        (["--stop", ""], "stop has an empty text"),
        (["--dtype", "flot32"], "--dtype flot32: there is no such type"),
        (["--model", "nowhere/at-all"], "no tokenizer can be loaded"),
    ],
)
def test_what_cannot_be_is_said(prompts, tmp_path, words, what):
    status, text = run(prompts, "--out", tmp_path / "samples.jsonl", *words)
    assert status == 1
    assert what in text
    assert "Traceback" not in text
