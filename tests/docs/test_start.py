"""Each command of docs/start.md, run as it is written: in one folder, in the page's order.

The runs on data of one's own are shortened by appending `--max_steps 1`, with a tiny model. The bundled job is run
whole, with the real model: minutes on a CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import save_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
INSTALL, BUNDLED, WRITE, CHECK, DRY_RUN, TRAIN, LOSSES, LOSS = BLOCKS


def shell(folder: Path, commands: str, *appended: str) -> str:
    """What a block prints; `appended` options are added to its last command."""
    for name in ("recipes", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "ACCELERATE_USE_CPU": "true"}
    whole = "set -e\n" + " ".join([commands.rstrip(), *appended]) + "\n"
    done = subprocess.run(["bash", "-c", whole], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_install_command_is_the_one_that_ci_runs_in_a_new_environment():
    assert 'pip install -c constraints.txt -e ".[dev]"' in INSTALL
    assert 'pip install -q -c constraints.txt -e ".[dev]"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_data_is_written_and_checked_and_prints_what_the_page_shows(tmp_path):
    shell(tmp_path, WRITE)
    shown = re.findall(r"```text\n(Read as .*?)```", PAGE, re.DOTALL)[0]
    assert shell(tmp_path, CHECK).strip() == shown.strip()


def test_the_losses_are_listed_and_explained(tmp_path):
    assert "simpo" in shell(tmp_path, LOSSES)


@pytest.mark.slow
def test_own_data_and_own_loss_train(tmp_path):
    shell(tmp_path, WRITE)
    tiny = ("--model_name_or_path", save_model(tmp_path))
    assert "nothing was trained" in shell(tmp_path, DRY_RUN, *tiny)
    for block in (TRAIN, LOSS):
        assert "Saved to runs/latest" in shell(tmp_path, block, *tiny, "--max_steps", "1")
    assert (tmp_path / "runs" / "latest-1" / "results.json").exists()


@pytest.mark.slow
def test_the_bundled_job_teaches_the_rule_and_prints_the_lines_that_the_page_explains(tmp_path):
    printed = shell(tmp_path, BUNDLED)
    first = re.findall(r"```text\n(Objective.*?)```", PAGE, re.DOTALL)[0].splitlines()
    for line in first:
        name, text = line.split(maxsplit=1)
        if name not in ("Model", "Device", "Cores"):  # the model's source and the machine differ
            assert f"{name:<10} {text}" in printed
    labels = re.findall(r"```text\n\s+before +after\n(.*?)Saved to", PAGE, re.DOTALL)[0]
    for line in labels.splitlines():
        assert re.split(r" {2,}", line)[0].split("(")[0].strip() in printed
    assert "Saved to runs/latest" in printed
    results = json.loads((tmp_path / "runs" / "latest" / "results.json").read_text(encoding="utf-8"))
    before, after = results["answers_before"], results["answers_after"]
    assert results["before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert results["after"]["eval_rewards/accuracies"] >= 0.90
    assert after["rule_rate"] - before["rule_rate"] >= 0.60
    assert after["empty"] == 0
    assert (tmp_path / "runs" / "latest" / "adapter_model.safetensors").exists()
