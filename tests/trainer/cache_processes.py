"""What each process of a run with a reference cache does; started by `test_cache_processes.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import gather_object
from peft import LoraConfig

from tests.processes import deepspeed_config
from tests.trainer.runs import make_pairs, make_trainer


def run(folder: Path, engine: str, kind: str, cache: str, **options: Any) -> dict[str, Any]:
    """Train for two epochs, and what came of it.

    Returns:
        The losses, and of each process how many rows the cache missed and how many the reference scored at each call.
    """
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if kind == "lora" else None
    trainer = make_trainer(
        folder,
        loss="dpo",
        model=str(folder / "llama-0"),
        seed=1,
        trainer_options={"peft_config": adapter},
        **{
            "reference_cache": cache if cache == "off" else str(folder / cache),
            "deepspeed": deepspeed_config(3) if engine == "zero3" else None,
            "ddp_backend": None if engine == "plain" else "gloo",
            "train_dataset": make_pairs(16),
            "num_train_epochs": 2,
            "max_steps": -1,
            **options,
        },
    )
    calls = []
    scores = trainer._scorer.run_reference
    trainer._scorer.run_reference = lambda rows, **options: calls.append(len(rows.ids)) or scores(rows, **options)
    trainer.train()
    kept = trainer._scorer.cache
    return {
        "world": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "calls": gather_object([calls]),
        "misses": gather_object([0 if kept is None else kept.misses]),
        "name": "" if kept is None else kept.folder.name,
    }


def main(folder: Path, engine: str, kind: str, caches: list[str]) -> None:
    results = [run(folder, engine, kind, cache, per_device_train_batch_size=4) for cache in caches]
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
