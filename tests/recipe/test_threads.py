"""Threads on a CPU: a launcher's default gives way to the process's share of the cores, a user's number stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from prefopt.recipe.arguments import threads
from prefopt.recipe.arguments.threads import _container_limit, _is_launcher, usable_cores, use_every_core

ROOT = Path(__file__).parents[2]
PROGRAM = f"""
import os, runpy, torch
use_every_core = runpy.run_path({threads.__file__!r})["use_every_core"]
use_every_core.__globals__["usable_cores"] = lambda: 6
use_every_core()
with open(os.environ["RESULTS"] + "/" + os.environ.get("RANK", "0"), "w") as file:
    file.write(str(torch.get_num_threads()))
"""
"""A process on six cores, wherever the test runs. The file is run alone: the whole package takes seconds to import."""
ACCELERATE = ["-m", "accelerate.commands.launch"]
TWO = [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]


def threads_of(folder: Path, launcher: list[str], **variables: str) -> list[str]:
    """The number of threads of every process that a launcher starts."""
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(ROOT), "RESULTS": str(folder), "HF_HOME": str(folder), **variables}
    done = subprocess.run(
        [sys.executable, *launcher, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [(folder / rank).read_text() for rank in ("0", "1") if (folder / rank).exists()]


@pytest.mark.parametrize(
    ("launcher", "variables", "expected"),
    [
        (ACCELERATE, {}, ["6"]),
        (ACCELERATE, {"OMP_NUM_THREADS": "1"}, ["1"]),
        ([*ACCELERATE, "--num_cpu_threads_per_process", "1"], {}, ["1"]),
        ([*ACCELERATE, "--num-cpu-threads-per-process=2"], {}, ["2"]),
        ([], {"OMP_NUM_THREADS": "1"}, ["1"]),
    ],
)
def test_a_launchers_default_gives_way_and_a_users_number_stays(tmp_path, launcher, variables, expected):
    assert threads_of(tmp_path, launcher, **variables) == expected


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [TWO, TORCHRUN])
@pytest.mark.parametrize(("variables", "expected"), [({}, ["3", "3"]), ({"OMP_NUM_THREADS": "1"}, ["1", "1"])])
def test_processes_of_a_machine_share_its_cores(tmp_path, launcher, variables, expected):
    assert threads_of(tmp_path, launcher, **variables) == expected


@pytest.fixture
def torchs_threads(monkeypatch):
    """The number of threads that torch is set to, in place of the real one."""
    count = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: count.__setitem__(0, number))
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return count


@pytest.mark.parametrize(
    ("before", "variables", "after"),
    [
        (8, {}, 4),  # torch counts the cores of the machine, not those of the container
        (1, {}, 1),  # torch.set_num_threads was called
        (8, {"LOCAL_WORLD_SIZE": "2"}, 2),
        (8, {"LOCAL_WORLD_SIZE": "9"}, 1),
        (8, {"OMP_NUM_THREADS": "8"}, 8),
        (8, {"MKL_NUM_THREADS": "8"}, 8),
    ],
)
def test_without_a_launcher(torchs_threads, monkeypatch, before, variables, after):
    torchs_threads[0] = before
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    use_every_core()
    assert torchs_threads[0] == after


def test_a_process_of_somebody_else_leaves_the_number_as_it_is(torchs_threads, monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    torchs_threads[0] = 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(psutil.Process, "environ", refuse)
    use_every_core()
    assert torchs_threads[0] == 1


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/venv/bin/python3 /venv/bin/accelerate launch train.py", True),
        ("python -W ignore -u -m accelerate.commands.launch train.py", True),
        ("/venv/bin/python3.11 /venv/bin/accelerate-launch train.py", True),
        ("python /venv/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("timeout 60 accelerate launch train.py", False),
        ("env OMP_NUM_THREADS=1 accelerate launch train.py", False),
        ("python sweep.py accelerate launch", False),
        ("bash", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command(command, launches):
    assert _is_launcher(command.split()) is launches


def test_cores_are_those_that_the_process_may_run_on(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    monkeypatch.setattr(threads, "_container_limit", list)
    assert usable_cores() == 3
    monkeypatch.setattr(threads, "_container_limit", lambda: [1.5])
    assert usable_cores() == 2
    monkeypatch.setattr(threads, "_container_limit", lambda: [0.2])
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "250000 100000\n"}, [2.5]),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [4.0]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ({}, []),
    ],
)
def test_the_limit_of_a_container(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _container_limit(tmp_path) == limit
