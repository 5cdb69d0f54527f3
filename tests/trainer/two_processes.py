"""What each process of a two-process run does; started by `test_two_processes.py` through torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from peft import LoraConfig

from tests.processes import deepspeed_config
from tests.trainer.runs import make_labelled, make_trainer


def main(folder: Path, loss: str, per_device: int, engine: str, kind: str, budget: int | None) -> None:
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if kind == "lora" else None
    trainer = make_trainer(
        folder,
        loss=loss,
        model=str(folder / "llama-0"),
        train_dataset=make_labelled(16) if loss.startswith("kto") else None,
        trainer_options={"peft_config": adapter},
        per_device_train_batch_size=per_device,
        max_steps=3,
        token_budget=budget,
        seed=1,
        ddp_backend="gloo",
        deepspeed=deepspeed_config(int(engine[-1])) if engine.startswith("zero") else None,
        output_dir=str(folder / f"run-{loss}-{per_device}"),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found = {
            "world": dist.get_world_size() if dist.is_initialized() else 1,
            "wrapped": type(trainer.model_wrapped).__name__,
            "masks": str(trainer._layout.masks),
            "chunked": trainer._layout.call.chunked_head,
            "log": log,
        }
        (folder / f"{found['world']}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        # Taking a gloo group down can deadlock with the interpreter's lock (torch joins its threads while holding it),
        # or abort at exit; everything is written by now.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    _, place, expression, batch, engine, kind, budget = sys.argv
    main(Path(place), expression, int(batch), engine, kind, int(budget) if budget != "None" else None)
