"""No secret in anything that a run prints, writes or pushes, wherever the secret was given."""

from __future__ import annotations

import logging
import sys
import zlib
from pathlib import Path

import pytest
import yaml

from prefopt.data import DataError
from prefopt.recipe import main, parse_arguments
from prefopt.safety import redaction
from tests.publishing.conftest import CANARIES, TRACKERS, TrackedRun
from tests.publishing.wandb_file import read
from tests.recipe.test_recipe import arguments, pairs_file


@pytest.fixture(autouse=True)
def _unguarded_afterwards(monkeypatch: pytest.MonkeyPatch):
    """What a recipe does to its process is undone: these tests share one."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(redaction, "_remembered", set())
    yield
    logging.setLogRecordFactory(factory)


def test_nothing_of_a_whole_run_holds_a_secret(tracked_run: TrackedRun) -> None:
    git = tracked_run.folder / ".git"
    files = [file for file in tracked_run.folder.rglob("*") if file.is_file() and git not in file.parents]
    written = {str(file.relative_to(tracked_run.folder)): file.read_bytes() for file in files}
    for expected in ("out/training_args.bin", "out/results.json", "out/README.md", "out/adapter_config.json"):
        assert expected in written
    everything = {
        **written,
        "what it printed": tracked_run.shown.encode(),
        **{f"pushed {name}": content for name, content in tracked_run.hub.files["tester/tiny"].items()},
    }
    if "wandb" in TRACKERS:
        (file,) = (tracked_run.folder / "wandb").glob("offline-run-*/*.wandb")
        everything["wandb's records"] = read(file)[2]  # joined, where the file cuts them into blocks
    found = [
        f"{place} holds {name}"
        for place, content in everything.items()
        for name, canary in CANARIES.items()
        if canary.encode() in content or canary.encode() in _inflated(content)
    ]
    assert not found
    assert "pushed README.md" in everything
    # The command is in the card, with a mask in the token's place.
    assert b"--hub_token ***" in written["out/README.md"]


def _inflated(content: bytes) -> bytes:
    try:
        return zlib.decompress(content)
    except zlib.error:
        return b""


def test_a_dry_run_shows_no_token_of_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    words = arguments(tmp_path, pairs_file(tmp_path))
    settings = {
        "hub_token": "hub-canary-0123",
        "run_name": "https://me:url-canary@host/run",
        "project": "hub-canary-0123",
    }
    config.write_text(yaml.safe_dump(settings))
    main("dpo", [*words, "--config", str(config), "--dry_run"])
    shown = "".join(capsys.readouterr())
    assert "run_name" in shown
    assert "canary" not in shown.replace("\n", "")


def test_errors_of_ours_show_no_password_of_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, "https://me:url-canary@host/pairs.jsonl")
    with pytest.raises(DataError, match=r"No file at 'https://\*\*\*@host/pairs.jsonl'"):
        main("dpo", [*words, "--dry_run"])
    assert "canary" not in "".join(capsys.readouterr()).replace("\n", "")


def test_a_config_that_is_no_yaml_is_quoted_without_its_token(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("hub_token: yaml-canary: more\n")
    with pytest.raises(SystemExit) as caught:
        parse_arguments("dpo", ["--config", str(config)])
    assert "not valid YAML" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("option", ["--hub_tokn", "--hubtoken", "--hf_token"])
def test_a_mistyped_option_does_not_give_its_value_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse_arguments("dpo", [*arguments(tmp_path, pairs_file(tmp_path)), option, "typed-canary-0123"])
    sys.excepthook(type(caught.value), caught.value, caught.value.__traceback__)
    shown = capsys.readouterr().err
    assert option in shown
    assert "typed-canary" not in shown
