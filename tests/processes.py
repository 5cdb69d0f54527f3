"""Tests on real processes: how they are started, and the engines that they run under on a CPU."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "zero1": "DeepSpeedEngine, stage 1",
    "zero2": "DeepSpeedEngine, stage 2",
    "zero3": "DeepSpeedEngine, stage 3",
    "fsdp2": "FSDPModule, sharded",
}
"""What `wrapper_of` must find under each engine."""
IN_WORDS = {
    "ddp": "2 processes, DDP",
    "zero1": "2 processes, DeepSpeed ZeRO-1",
    "zero2": "2 processes, DeepSpeed ZeRO-2",
    "zero3": "2 processes, DeepSpeed ZeRO-3",
    "fsdp2": "2 processes, FSDP2",
}
"""What a recipe says it runs on."""


@dataclass(frozen=True)
class Ended:
    """How a run of several processes ended: its exit status, and what it wrote."""

    status: int
    stdout: str
    stderr: str


TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2")
PORT = {"torch.distributed.run": "--master_port", "accelerate.commands.launch": "--main_process_port"}


def launch(command: list[str], launcher: Sequence[str] = TORCHRUN, timeout: int = 900) -> Ended:
    """Run a Python command on several processes of one thread each, and wait; nothing of it outlives the timeout.

    Args:
        command: a script or `-m` and a module, and its arguments.
        launcher: a module of `PORT` and its arguments.
        timeout: seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = subprocess.Popen(
        [sys.executable, "-m", *launcher, f"{PORT[launcher[0]]}={port}", *command],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The launcher ends its workers when it is told to; killed, it would leave them waiting for one another.
        run.send_signal(signal.SIGTERM)
        _, stderr = run.communicate(timeout=300)
        raise AssertionError(f"still running after {timeout} seconds\n{stderr[-3000:]}") from None
    return Ended(run.returncode, stdout, stderr)


def torchrun(module: str, *arguments: str, timeout: int = 900) -> None:
    """Run a module on two processes; they must both end well."""
    ended = launch(["-m", module, *arguments], timeout=timeout)
    assert ended.status == 0, ended.stderr[-3000:]


# ---- engines -------------------------------------------------------------------------------------------------------


def engine_options(engine: str, sharded_checkpoints: bool = False) -> dict[str, Any]:
    """Training arguments that make a run use an engine on a CPU; "plain" is one process. Call before any trainer.

    Args:
        engine: one of `ENGINES`, or "plain".
        sharded_checkpoints: have FSDP write them so, which is accelerate's default; transformers' is whole ones.
    """
    if engine == "plain":
        return {}
    if engine.startswith("zero"):
        return {"ddp_backend": "gloo", "deepspeed": deepspeed_config(int(engine[-1]))}
    if engine == "fsdp2":
        fsdp_on_cpu()
        kind = "SHARDED_STATE_DICT" if sharded_checkpoints else "FULL_STATE_DICT"
        return {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": kind}}
    return {"ddp_backend": "gloo"}


def deepspeed_config(stage: int) -> dict[str, Any]:
    """ZeRO on a CPU, without what DeepSpeed would compile first. To be called before the first trainer."""
    no_compiled_all_reduce()
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # So small a model would otherwise stay whole on every process.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        # DeepSpeed's own would compile an extension.
        "zero_force_ds_cpu_optimizer": False,
    }


def no_compiled_all_reduce() -> None:
    """Keep DeepSpeed from compiling, for more than a minute, a faster all-reduce within one machine."""
    # The module is hidden behind PyTorch's name in its package.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def fsdp_on_cpu() -> None:
    """Let accelerate use FSDP over gloo, as it does over a GPU's backend; by itself it wraps in DDP without a word.

    Everything after that is the code that runs on GPUs: `fsdp2_prepare_model`, saving, loading.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    set_up = AcceleratorState.__init__
    if getattr(set_up, "fsdp_on_cpu", False):
        return

    def with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
        set_up(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with_fsdp.fsdp_on_cpu = True
    AcceleratorState.__init__ = with_fsdp


def wrapper_of(trainer: Any) -> str:
    """What a trainer's model is really wrapped in, and how its weights lie; see `WRAPPERS`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    model = trainer.model_wrapped
    if isinstance(model, FSDPModule):
        sharded = all(isinstance(value, DTensor) for value in model.parameters())
        mine = sum(value.to_local().numel() for value in model.parameters() if isinstance(value, DTensor))
        whole = sum(value.numel() for value in model.parameters())
        return "FSDPModule, sharded" if sharded and mine < 0.6 * whole else "FSDPModule, not sharded"
    if hasattr(model, "zero_optimization_stage"):
        return f"{type(model).__name__}, stage {model.zero_optimization_stage()}"
    return type(model).__name__
