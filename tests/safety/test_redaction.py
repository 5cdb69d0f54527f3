"""Secrets are found by value, by shape and by name; ordinary words are left alone."""

from __future__ import annotations

import logging
import sys

import pytest

from prefopt.safety import redaction
from prefopt.safety.redaction import command_line, guard_process, is_secret, redact, redacted, words_without_secrets

HUB = "hf_abcdefghijklmnopqrstuvwxyz01234567"


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"token {HUB}.", "token hf_***."),
        ("https://me:pa55word@host/x.git", "https://***@host/x.git"),
        ("HTTP://me:p@ss@host/x", "HTTP://***@host/x"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("https://host/f?token=abc123&b=1", "https://host/f?token=***&b=1"),
        ("hub_token: whatever", "hub_token: ***"),
        ("{'api_key': 'whatever', 'a': 1}", "{'api_key': '***', 'a': 1}"),
        ('--model_init_kwargs \'{"token": "whatever"}\'', '--model_init_kwargs \'{"token": "***"}\''),
        ("not used: ['--hub_tokn', 'whatever']", "not used: ['--hub_tokn', '***']"),
        ("--wandb_api_key whatever --x", "--wandb_api_key *** --x"),
    ],
)
def test_secrets_by_shape_and_by_name(text: str, clean: str) -> None:
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "token_budget: 4096", "pad_token: <pad>", "max_new_tokens=4", "lora_target_modules: ['key', 'k_proj']",
        "me@host", "https://huggingface.co/a/b@main", "hf_transfer", "dpo(beta=0.1) + 0.2*sft(nll='token')",
        "path/to/hf_models/llama", "mean_token_accuracy 0.5", "the key=value form",
    ],
)  # fmt: skip
def test_ordinary_words_stay(text: str) -> None:
    assert redact(text) == text


def test_secrets_of_the_environment_and_those_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_PASSWORD", "sesame-open")
    monkeypatch.setenv("PAD_TOKEN", "<|endoftext|>")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    redaction.remember("one-time-secret", None, "abc")
    assert (
        redact("0123456789abcdef sesame-open one-time-secret <|endoftext|> ab abc")
        == "*** *** *** <|endoftext|> ab abc"
    )


def test_settings_inside_mappings() -> None:
    settings = {"token": "x", "revision": "main", "deep": [{"password": "y", "n": 3}], "none_token": None}
    clean = {"token": "***", "revision": "main", "deep": [{"password": "***", "n": 3}], "none_token": None}
    assert redacted(settings) == clean


def test_which_names_are_secrets() -> None:
    assert all(map(is_secret, ("hub_token", "push_to_hub_token", "token", "api_key", "WANDB_API_KEY", "password")))
    assert not any(map(is_secret, ("pad_token", "token_budget", "eos_token", "max_new_tokens", "monkey", "keys")))


def test_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["recipes/dpo.py", "--hub_token", "s3cret-word", "--hub-token=s3cret-too", "--push_to_hub", "--loss"]
    words += ["dpo(beta=0.1) + 0.2*sft", "--dataset_name", "/home/somebody/pairs.jsonl", "--run_name", "s3cret-word"]
    shown = command_line(words)
    assert "s3cret-word" not in shown.split("--run_name")[0]
    assert "s3cret-too" not in shown
    assert "somebody" not in shown
    assert "--loss 'dpo(beta=0.1) + 0.2*sft'" in shown
    # What has been seen as a token is one wherever it turns up.
    assert redact("s3cret-word and s3cret-too") == "*** and ***"


def test_an_option_without_a_value_hides_nothing() -> None:
    assert words_without_secrets(["--hub_token", "--push_to_hub", "true"]) == ["--hub_token", "--push_to_hub", "true"]


def test_a_guarded_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--hub_token", "very-secret"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tests.redaction")
    logger.addHandler(handler)
    try:
        guard_process()
        guard_process()
        assert sys.argv == ["dpo.py", "--hub_token", "***"]
        logger.warning("got %s and %d", "very-secret", 3)
        logger.warning("plain %s", "words")
        try:
            raise RuntimeError("failed with very-secret")
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert logged == ["got *** and 3", "plain words"]
    shown = capsys.readouterr().err
    assert "RuntimeError: failed with ***" in shown
    assert "very-secret" not in shown
