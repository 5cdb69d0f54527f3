"""What each process does to find out the fingerprints of FSDP's models; started by `test_fingerprint.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from prefopt.scoring.fingerprint import fingerprint, is_sharded
from tests.tiny import make_model


def sharded(model):
    for layer in (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert is_sharded(model)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    local = sum(value.to_local().numel() for value in model.parameters())
    assert local < 0.6 * sum(value.numel() for value in model.parameters())
    return model


def refusal(use_orig_params: bool) -> str:
    flat = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    assert is_sharded(flat.module)
    try:
        return fingerprint(flat.module)
    except ValueError as error:
        return str(error)


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    found = {
        "world": dist.get_world_size(),
        "plain": fingerprint(sharded(make_model())),
        "bfloat16": fingerprint(sharded(make_model(dtype=torch.bfloat16))),
        "other": fingerprint(sharded(make_model(seed=1))),
        "adapter": fingerprint(
            sharded(get_peft_model(make_model(), LoraConfig(target_modules="all-linear"))), "default"
        ),
        "flat": refusal(use_orig_params=False),
        "flat, own names": refusal(use_orig_params=True),
    }
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(theirs == found for theirs in everywhere)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    dist.barrier()
    # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
