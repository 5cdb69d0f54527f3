"""What each of two processes does in `test_saved_folder.py`: train, save, say what the trained model says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.publishing.folders import log_probabilities, lora
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_trainer


def main(folder: Path, kind: str) -> None:
    trainer = make_trainer(
        folder, loss="dpo(beta=0.1)", model=str(folder / "llama-0"), per_device_train_batch_size=2, max_steps=3,
        learning_rate=1e-2, ddp_backend="gloo", trainer_options={"peft_config": lora() if kind == "lora" else None},
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "out"))
    if trainer.is_world_process_zero():
        found = {
            "world": dist.get_world_size(),
            "wrapped": type(trainer.model_wrapped).__name__,
            "learnt": log_probabilities(trainer.accelerator.unwrap_model(trainer.model), make_tokenizer()),
        }
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    # Taking a gloo group down can deadlock or abort at exit; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
