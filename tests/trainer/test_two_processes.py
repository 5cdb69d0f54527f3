"""Two real processes over gloo log and learn what one process does with the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import save_model

ROOT = Path(__file__).parents[2]


def launch(folder: Path, processes: int, *arguments: str) -> dict:
    save_model(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, "-m", "tests.trainer.two_processes", str(folder), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{processes}.json").read_text())


@pytest.mark.parametrize("loss", ["dpo + 0.1*sft(nll='token')", "kto(beta=0.5) + 0.1*sft(nll='sum')"])
def test_two_processes_equal_one(tmp_path, loss):
    together, alone = launch(tmp_path, 2, loss, "4"), launch(tmp_path, 1, loss, "8")
    assert together["world"] == 2
    assert together["wrapped"] == "DistributedDataParallel"
    # The moved completions of KTO's baseline come from other prompts in smaller batches: its estimate differs.
    differs = {"epoch", "learning_rate", "mismatched_ratios", "kto/mismatched_ratios"}
    for mine, reference in zip(together["log"], alone["log"], strict=True):
        for name in set(reference) - differs:
            loose = loss.startswith("kto") and name not in ("num_tokens", "lengths/chosen", "lengths/rejected")
            assert mine[name] == pytest.approx(reference[name], rel=5e-2 if loose else 1e-4, abs=1e-5), name


def test_a_token_budget_changes_nothing_on_two_processes(tmp_path):
    """The two processes cut their batches in different numbers of parts, and exchange gradients once a step."""
    parts, whole = launch(tmp_path, 2, "dpo + 0.1*sft", "4", "50"), launch(tmp_path, 1, "dpo + 0.1*sft", "8")
    assert parts["wrapped"] == "DistributedDataParallel"
    for mine, reference in zip(parts["log"], whole["log"], strict=True):
        for name in set(reference) - {"epoch", "learning_rate"}:
            assert mine[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
