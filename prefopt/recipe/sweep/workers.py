"""Several devices: a process for each, which takes trials from the study until all have been started."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class SweepCall:
    """How a sweep was called.

    Attributes:
        config: the file, or the name of one that comes with the package.
        changes: base options that replace the file's.
        folder: of the sweep, instead of the file's `output_dir`.
    """

    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None

    @property
    def words(self) -> list[str]:
        """The command line after `prefopt`."""
        changes = [word for name, value in self.changes.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        return ["sweep", self.config, *changes, *(() if self.folder is None else ("--output_dir", self.folder))]

    @property
    def command(self) -> str:
        """The whole command line."""
        return shlex.join(["prefopt", *self.words])


def devices() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; empty without one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


def run_workers(call: SweepCall, names: Sequence[str]) -> None:
    """Run trials in a process per device, and wait for all.

    Args:
        call: of the sweep.
        names: of the devices.

    Raises:
        UsageError: if one of them ended with an error. Trials that it left are run when the sweep is continued.
    """
    command = [sys.executable, "-m", "prefopt", *call.words, "--worker"]
    workers = [subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": name}) for name in names]
    try:
        codes = [worker.wait() for worker in workers]
    except BaseException:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        raise
    if failed := [name for name, code in zip(names, codes, strict=True) if code]:
        raise UsageError(
            f"the process on device {', '.join(failed)} ended with an error (above). To continue the sweep: "
            f"{call.command}"
        )
