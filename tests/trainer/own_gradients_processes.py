"""What each process does with losses that look after gradients themselves; see `test_own_gradients_processes.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from prefopt.losses import SFT, ConflictFree
from tests.trainer.runs import make_pairs, make_trainer
from tests.trainer.test_learned import Tempered

LOSSES = {
    "config": "conflict_free(dpo(beta=0.5) + 0.3*sft(nll='mean'))",
    "pcgrad": "conflict_free(dpo(beta=0.5) + 0.3*sft(nll='mean'), method='pcgrad')",
    "batchwise": "conflict_free(dpo(beta=0.5) + sft(nll='token'))",
    "normalised": "pair_normalized(20*dpo(beta=0.5))",
    "normalised, little left": "pair_normalized(hinge(beta=2000.0))",  # most pairs are past it after a step
    "learned": Tempered,
    "learned, conflict free": lambda: ConflictFree(Tempered() + SFT()),
}


def main(folder: Path, per_device: int) -> None:
    found = {}
    for name, loss in LOSSES.items():
        trainer = make_trainer(
            folder, model=str(folder / "llama-0"), train_dataset=make_pairs(16), seed=1, max_steps=3,
            per_device_train_batch_size=per_device // 2, gradient_accumulation_steps=2,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            # Steps that follow the gradient's size, where Adam's would hide a wrong one.
            optim="sgd", learning_rate=0.05, loss_learning_rate=0.05,
            trainer_options={"loss": loss if isinstance(loss, str) else loss()},
        )  # fmt: skip
        start = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).clone()
        trainer.train()
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        found[name] = {
            "world": trainer.accelerator.num_processes,
            "wrapped": type(trainer.model_wrapped).__name__,
            "moved": float((weights - start).norm()),
            "weights": weights.tolist(),
            "same": len(set(gather_object([weights.double().sum().item()]))) == 1,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
    if trainer.is_world_process_zero():
        (folder / f"{trainer.accelerator.num_processes}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
