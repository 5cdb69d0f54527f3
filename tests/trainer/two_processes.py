"""What each process of a two-process run does; started by `test_two_processes.py` through torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.trainer.runs import make_labelled, make_trainer


def main(folder: Path, loss: str, per_device: int, budget: int | None) -> None:
    trainer = make_trainer(
        folder,
        loss=loss,
        model=str(folder / "llama-0"),
        train_dataset=make_labelled(16) if loss.startswith("kto") else None,
        per_device_train_batch_size=per_device,
        max_steps=3,
        token_budget=budget,
        seed=1,
        ddp_backend="gloo",
        output_dir=str(folder / f"run-{loss}-{per_device}"),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        wrapped = type(trainer.model_wrapped).__name__
        world = dist.get_world_size() if dist.is_initialized() else 1
        (folder / f"{world}.json").write_text(json.dumps({"world": world, "wrapped": wrapped, "log": log}))
    if dist.is_initialized():
        dist.barrier()
        # Taking a gloo group down can deadlock with the interpreter's lock (torch joins its threads while holding it),
        # or abort at exit; everything is written by now.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
