"""The number of threads that a process on a CPU computes with: its share of the cores, unless the user set a number.

`accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 where the user set nothing. One core would then do all the
work.
"""

from __future__ import annotations

import math
import os
import re
from itertools import pairwise
from pathlib import Path

import psutil
import torch

_VARIABLE = "OMP_NUM_THREADS"
_LAUNCHER = re.compile(r"accelerate([-_.][\w.]+)?|torchrun|torch\.distributed\.\w+")
_THREADS_OPTION = re.compile(r"--num[-_]cpu[-_]threads[-_]per[-_]process(=.*)?")


def use_every_core() -> None:
    """Let torch compute with this process's share of the cores; a number that the user set stays.

    The user may set it in OMP_NUM_THREADS or MKL_NUM_THREADS, as the launcher's `--num_cpu_threads_per_process`, or
    with `torch.set_num_threads`. Without any of them, torch takes every core of the machine, also in a container that
    may use only some: it then gets fewer.
    """
    if "MKL_NUM_THREADS" in os.environ:
        return
    share = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    threads = torch.get_num_threads()
    if _VARIABLE not in os.environ:
        torch.set_num_threads(min(threads, share))
    elif os.environ[_VARIABLE] == str(threads) and _is_a_launchers_default():
        torch.set_num_threads(share)


def usable_cores() -> int:
    """Physical cores that this process may use: at most those of its affinity mask and of its container's limit."""
    counts = [float(psutil.cpu_count(logical=False) or os.cpu_count() or 1)]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    return max(1, math.ceil(min([*counts, *_container_limit()])))


def _container_limit(root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """The cores that a container may use (control groups, versions 2 and 1); empty without a limit."""
    try:
        if (file := root / "cpu.max").is_file():
            quota, period = file.read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        # "max" and -1 mean no limit.
        return [int(quota) / int(period)] if quota.isdecimal() else []
    except (OSError, ValueError):
        return []


def _is_a_launchers_default() -> bool:
    """Whether a launcher set the variable by itself.

    That launcher is the nearest process above this one that started without the variable. If a person or a job script
    set it, that process is a shell, or there is none.
    """
    try:
        for process in psutil.Process().parents():
            if _VARIABLE not in process.environ():
                words = process.cmdline()
                return _is_launcher(words) and not any(_THREADS_OPTION.fullmatch(word) for word in words)
    except psutil.Error:  # a process of somebody else: what it set is unknown
        pass
    return False


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line runs `accelerate` or `torchrun`, as a program or as a module.

    Not one that only names them, as `timeout 60 accelerate launch ...` does: that process sets nothing.
    """
    program = Path(words[0]).name if words else ""
    if program.startswith("python"):
        # The script, or the module after -m; -W and -X take a word of their own.
        pairs = pairwise(words)
        program = next((word for last, word in pairs if word[:1] != "-" and last not in ("-W", "-X")), "")
    return _LAUNCHER.fullmatch(Path(program).name) is not None
