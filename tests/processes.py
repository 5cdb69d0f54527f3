"""Tests on real processes: how they are started, and the DeepSpeed that they run under."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def torchrun(module: str, *arguments: str, processes: int = 2, timeout: int = 400) -> None:
    """Run a module on several processes of one thread each, and wait; they must all end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO on a CPU, without what DeepSpeed would compile first. To be called before the first trainer."""
    # A faster all-reduce within one machine, of more than a minute. The module is hidden behind PyTorch's name in its
    # package.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # So small a model would otherwise stay whole on every process.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        # DeepSpeed's own would compile an extension.
        "zero_force_ds_cpu_optimizer": False,
    }
