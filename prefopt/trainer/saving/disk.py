"""Whether the output folder is writable and has room for checkpoints, checked before training."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from torch import nn

from prefopt.trainer.saving.checkpoints import CheckpointError, find

logger = logging.getLogger(__name__)

_PROBE_BYTES = 4096


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Make the folder that an option names and write a file into it.

    Raises:
        CheckpointError: naming the folder and why it cannot be written to.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * _PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        what = "output folder" if option == "output_dir" else f"folder of {option}"
        raise CheckpointError(
            f"the {what} {folder} cannot be written to ({reason}), so nothing of this run could be saved: use "
            f"another {option}, or make it writable and free space on its disk"
        ) from error


def checkpoint_bytes(model: nn.Module, args: Any, sharded: bool) -> tuple[int, bool]:
    """The size of a checkpoint, and whether it is known rather than estimated.

    Args:
        model: with the adapters that are trained.
        args: the training arguments: the optimizer and whether it is saved.
        sharded: whether DeepSpeed or FSDP saves, with their own float32 copies.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(_bytes(parameter) for parameter in saved)
    if getattr(args, "sync_ref_model", False):
        weights *= 2  # the reference that follows the policy
    if args.save_only_model:
        return weights, not sharded
    if sharded:
        # A float32 copy and two moments.
        return weights + 12 * sum(_numel(parameter) for parameter in trained), False
    optimizer = str(getattr(args.optim, "value", args.optim))
    plain_adam = optimizer in ("adamw_torch", "adamw_torch_fused")
    # Others keep less (Adafactor, 8-bit) or as much; half of Adam's is an estimate, used for a warning only.
    moments = sum(_bytes(parameter) for parameter in trained) * (2 if plain_adam else 1)
    return weights + moments, plain_adam


def _numel(parameter: Any) -> int:
    # A parameter sharded by ZeRO-3 is empty and has its size in another attribute.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _bytes(parameter: Any) -> int:
    return _numel(parameter) * int(parameter.element_size())


def check_room(folder: Path, model: nn.Module, args: Any, sharded: bool) -> None:
    """Compare the free disk space with what the run will write.

    Args:
        model, args, sharded: as `checkpoint_bytes` takes them.

    Raises:
        CheckpointError: if not even one checkpoint fits. If its size is an estimate, or if one fits but not all that
            will be kept, a warning is logged.
    """
    size, known = checkpoint_bytes(model, args, sharded)
    free = shutil.disk_usage(folder).free
    if free < size:
        message = (
            f"a checkpoint of this run takes about {size / 1e9:.3g} GB, but the disk of {folder} has {free / 1e9:.3g} "
            "GB left: make room, give another output_dir, train an adapter (use_peft), or set save_strategy='no'"
        )
        if known:
            raise CheckpointError(message)
        logger.warning(message)
        return
    at_once = planned(args)
    # A new one is written before the oldest is deleted; existing ones are replaced in time.
    count = at_once - min(at_once - 1, len(find(folder))) if at_once else 1
    if free < count * size:
        logger.warning(
            "checkpoints of this run take about %.3g GB each and up to %d more will be kept, but the disk of %s has "
            "%.3g GB left: make room, or lower save_total_limit (now %s)",
            *(size / 1e9, count, folder, free / 1e9, args.save_total_limit),
        )


def planned(args: Any) -> int:
    """The maximum number of checkpoints at once according to the arguments; 0 if unknown."""
    if args.save_total_limit:
        return int(args.save_total_limit) + 1
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps" and args.max_steps > 0:
        every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * args.max_steps))
        return -(-int(args.max_steps) // int(every))
    return 0
