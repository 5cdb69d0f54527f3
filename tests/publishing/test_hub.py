"""`--push_to_hub`, against a stand-in of the Hub: what arrives, what stays here, and what a failing Hub costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.publishing.folders import load, log_probabilities
from tests.publishing.hub import TOKEN, Hub
from tests.recipe.test_recipe import arguments, pairs_file

ROOT = Path(__file__).parents[2]
PUSH = ("--push_to_hub", "--hub_model_id", "tester/tiny", "--learning_rate", "1e-2")
EVERY_STEP = ("--save_strategy", "steps", "--save_steps", "1", "--hub_always_push", "true")


def run(
    folder: Path, hub: Hub, *more: str, data: str | None = None, token: str = TOKEN
) -> subprocess.CompletedProcess:
    """The recipe in a process for which `hub` is the Hub."""
    environment = {
        **os.environ, **hub.environment, "HF_TOKEN": token, "HF_HOME": str(folder / "home"), "COLUMNS": "300",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    words = arguments(folder, data or pairs_file(folder), *more)
    command = [sys.executable, str(ROOT / "recipes" / "dpo.py"), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def arrived(hub: Hub, folder: Path) -> Path:
    """What the Hub has, written to a folder."""
    for name, content in hub.files["tester/tiny"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_arrives_is_the_model_its_tokenizer_and_its_card(tmp_path: Path) -> None:
    data = pairs_file(tmp_path, bad_3={"chosen": []})
    with Hub() as hub:
        done = run(
            tmp_path, hub, *PUSH, "--use_peft", "--hub_private_repo", "true", "--on_bad_rows", "drop", data=data
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Pushed to tester/tiny" in done.stdout
        assert hub.repos["tester/tiny"]["visibility"] == "private"
        (commit,) = hub.commits["tester/tiny"]
        assert commit.message == "End of training"
        assert commit.files == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "base_sample.json", "chat_template.jinja",
            "results.json", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        there = arrived(hub, tmp_path / "there")
    out, base = tmp_path / "out", str(tmp_path / "llama-0")
    # Both are in the folder here, and neither is anybody else's business.
    assert (out / "dropped_training_rows.jsonl").exists()
    assert (out / "training_args.bin").exists()
    assert log_probabilities(*load(there, base)) == pytest.approx(log_probabilities(*load(out, base)), abs=1e-6)
    card = ModelCard((there / "README.md").read_text(encoding="utf-8"))
    results = json.loads((there / "results.json").read_text())
    assert f"{results['after']['eval_loss']:.4g}" in card.text
    assert "PeftModel.from_pretrained(base, 'tester/tiny')" in card.text
    assert TOKEN not in "".join(map(str, hub.files["tester/tiny"].values()))


def test_saves_are_pushed_while_training_goes_on(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.repos["tester/tiny"] = {}  # it exists already
        hub.files["tester/tiny"], hub.commits["tester/tiny"] = {}, []
        done = run(tmp_path, hub, *PUSH, *EVERY_STEP, "--hub_strategy", "every_save", "--save_total_limit", "1")
        assert done.returncode == 0, done.stderr[-3000:]
        messages = [commit.message for commit in hub.commits["tester/tiny"]]
        assert messages[-1] == "End of training"
        assert set(messages[:-1]) == {"Training in progress, step 1", "Training in progress, step 2"}
        for commit in hub.commits["tester/tiny"]:
            assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= commit.files
            assert not [name for name in commit.files if name.endswith((".bin", ".pt", ".pth")) or "/" in name]
    assert not list((tmp_path / "out").glob("_push-*"))


def test_the_checkpoint_strategy_pushes_what_resuming_needs_into_a_folder(tmp_path: Path) -> None:
    with Hub() as hub:
        done = run(tmp_path, hub, *PUSH, *EVERY_STEP, "--hub_strategy", "checkpoint", "--use_peft")
        assert done.returncode == 0, done.stderr[-3000:]
        names = set(hub.files["tester/tiny"])
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= names
    assert not [name for name in names if "training_args" in name]
    assert not [name for name in names if name.startswith(("optimizer", "scheduler", "rng_state", "checkpoint-"))]


def test_a_hub_that_fails_costs_no_model(tmp_path: Path) -> None:
    with Hub() as hub:
        hub.fail = {"/api/models/tester/tiny/commit": 500}
        done = run(tmp_path, hub, *PUSH, *EVERY_STEP, "--hub_strategy", "every_save")
        assert hub.files["tester/tiny"] == {}
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the push to tester/tiny failed: " in done.stdout
    assert "pushes during training failed" in done.stderr
    out = tmp_path / "out"
    assert f"hf upload tester/tiny {out} . --exclude" in done.stdout
    assert json.loads((out / "results.json").read_text())["after"]["eval_loss"] > 0
    assert len(log_probabilities(*load(out))) > 10


@pytest.mark.parametrize("reason", ["token", "server"])
def test_a_hub_that_refuses_the_repository_stops_the_run_before_it_trains(tmp_path: Path, reason: str) -> None:
    with Hub() as hub:
        hub.fail = {"/api/repos/create": 500} if reason == "server" else {}
        hub.credentials = "user:pa55word@"  # in the address, which errors name
        done = run(tmp_path, hub, *PUSH, token="hf_wrongTokenWrongTokenWrong000" if reason == "token" else TOKEN)
    assert done.returncode == 1
    said = done.stderr[done.stderr.index("push_to_hub: the repository") :]
    assert "the repository 'tester/tiny' could not be created or found: " in said
    assert ("401" if reason == "token" else "500") in said
    assert "hf auth login" in said
    assert said.strip().endswith("Nothing was trained")
    for secret in ("hf_wrong", "pa55word", TOKEN):
        assert secret not in done.stderr + done.stdout
    assert "step 1/2" not in done.stdout


def test_a_dry_run_asks_the_hub_that_is_configured(tmp_path: Path) -> None:
    with Hub() as hub:
        done = run(tmp_path, hub, "--model_name_or_path", "nobody/nothing", "--dry_run")
        asked = {path for _, path in hub.requests}
    assert "/api/models/HuggingFaceTB/SmolLM2-135M-Instruct" in asked
    assert any("nobody/nothing" in path for path in asked)
    assert "nobody/nothing" in done.stderr + done.stdout
