"""The processes and the distributed engine of a run, in words.

Imports accelerate and torch; changes nothing.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


def describe_engine(trainer: Any) -> str:
    """Such as "2 processes, DeepSpeed ZeRO-3".

    Once the trainer has wrapped its model, this is the actual wrapper; before that, what accelerate is set up for.
    """
    count = trainer.accelerator.num_processes
    name = _wrapper(trainer.model_wrapped) or _set_up(trainer.accelerator)
    return f"{count} process{'es' if count > 1 else ''}{f', {name}' if name else ''}"


def _wrapper(model: Any) -> str:
    if isinstance(model, FSDPModule):
        return "FSDP2"
    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if hasattr(model, "zero_optimization_stage"):
        return _zero(model.zero_optimization_stage())
    return ""


def _set_up(accelerator: Any) -> str:
    kind = accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        return _zero(accelerator.state.deepspeed_plugin.zero_stage)
    if kind is DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "DDP" if accelerator.num_processes > 1 else ""


def _zero(stage: int) -> str:
    return f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed without ZeRO"


def not_as_asked(trainer: Any) -> str:
    """One sentence if accelerate silently started something else than was asked for, as it does on CPUs; else ""."""
    if trainer.accelerator.num_processes == 1 and _several_were_asked_for():
        return (
            "accelerate launch was asked for several processes and started one, as it does with fewer than two GPUs: "
            "this run has 1 process, and a step has the examples of one. For several on a CPU, give it --multi_gpu "
            "and not --cpu."
        )
    asked = bool(trainer.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or trainer.is_fsdp_enabled:
        return ""
    return (
        f"FSDP was requested, but accelerate uses it only on GPUs and the like: this run has "
        f"{describe_engine(trainer)}, and every process keeps the whole model."
    )


def _several_were_asked_for() -> bool:
    """Whether accelerate's launcher of a single process was told of more: it then leaves an address, but no rank."""
    names = os.environ.keys()
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= names and not {"RANK", "WORLD_SIZE"} & names
