"""What each process of a run does that meets a poisoned row; started by `test_finite.py` through torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.processes import deepspeed_config
from tests.trainer.poison import loss_of, pairs
from tests.trainer.runs import make_trainer


def main(folder: Path, engine: str, kind: float, budget: int | None) -> None:
    trainer = make_trainer(
        folder,
        model=str(folder / "llama-0"),
        train_dataset=pairs(kind, 3),
        trainer_options={"loss": loss_of("dpo")},
        per_device_train_batch_size=2,
        max_steps=8,
        token_budget=budget,
        seed=3,
        ddp_backend="gloo",
        deepspeed=deepspeed_config(int(engine[-1])) if engine.startswith("zero") else None,
    )
    message = ""
    try:
        trainer.train()
    except FloatingPointError as error:
        message = str(error)
    found = {
        "world": dist.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "step": trainer.state.global_step,
        "message": message,
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    # Taking a gloo group down can deadlock at exit; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _, place, engine, kind, budget = sys.argv
    main(Path(place), engine, float(kind), int(budget) if budget != "None" else None)
