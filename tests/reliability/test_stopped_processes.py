"""Two processes over gloo: one is killed, one told to stop, then the launcher; the run goes on each time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.trainer.saving import checkpoints
from tests.trainer.runs import require, save_model

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path, run: str, name: str = "none", rank: int = 0, step: int = 0, engine: str = "ddp"
) -> tuple[int, str]:
    """Run on two processes; "wait" has them wait at a step until the launcher has been sent SIGTERM."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += ["-m", "tests.reliability.stopped_processes", str(folder), run, engine, name, str(rank), str(step)]
    output = folder / f"{run}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            if name == "wait":
                deadline = time.monotonic() + 900
                while process.poll() is None and time.monotonic() < deadline:
                    if all((folder / f"waiting-{number}").exists() for number in range(2)):
                        process.send_signal(signal.SIGTERM)
                        break
                    time.sleep(0.1)
            code = process.wait(900)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return code, output.read_text()


def newest(folder: Path) -> int:
    return int(checkpoints.choose("auto", folder)[0].name.split("-")[1])


def test_whatever_ends_two_processes_they_go_on_as_if_nothing_had(tmp_path):
    save_model(tmp_path)
    code, said = launch(tmp_path, "whole")
    assert code == 0, said[-3000:]
    run = tmp_path / "again"
    # One process is gone: the launcher ends the other.
    code, said = launch(tmp_path, "again", "SIGKILL", rank=1, step=3)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in said, said[-3000:]
    assert newest(run) == 2
    # One process alone is told to stop: both end after the same step.
    code, said = launch(tmp_path, "again", "SIGTERM", rank=1, step=4)
    assert code != 0
    assert f"SIGTERM after step 5; {run}/checkpoint-5 is complete" in said, said[-3000:]
    assert newest(run) == 5
    # The launcher is told to stop, and tells both.
    code, said = launch(tmp_path, "again", "wait", step=6)
    assert code != 0
    assert f"SIGTERM after step 7; {run}/checkpoint-7 is complete" in said, said[-3000:]
    assert newest(run) == 7
    assert not (tmp_path / "again.json").exists()
    code, said = launch(tmp_path, "again")
    assert code == 0, said[-3000:]
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "again"))
    assert whole["world"] == again["world"] == 2
    weights, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert [entry["loss"] for entry in again["log"] if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in whole["log"] if "loss" in entry], rel=1e-6
    )


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_sharded_checkpoints_are_complete_and_gone_on_from(tmp_path, engine):
    require(engine)
    save_model(tmp_path)
    code, said = launch(tmp_path, "whole", engine=engine)
    assert code == 0, said[-3000:]
    code, said = launch(tmp_path, "again", "SIGTERM", rank=1, step=4, engine=engine)
    assert code != 0
    assert f"SIGTERM after step 5; {tmp_path}/again/checkpoint-5 is complete" in said, said[-3000:]
    listed = json.loads((tmp_path / "again" / "checkpoint-5" / "complete.json").read_text())["files"]
    assert sum("optim_states" in name for name in listed) == 2, listed
    code, said = launch(tmp_path, "again", engine=engine)
    assert code == 0, said[-3000:]
    weights, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-6, atol=1e-8)
