"""What each process of a two-process run does that is killed or stopped; started by `test_stopped_processes.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import LoraConfig
from transformers import TrainerCallback

from tests.processes import deepspeed_config
from tests.trainer.runs import make_pairs, make_trainer


class Sends(TrainerCallback):
    """Sends this process a signal within a step, or waits there to be sent one."""

    def __init__(self, name: str, rank: int, step: int, folder: Path):
        self.name, self.rank, self.step, self.folder = name, rank, step, folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != self.step:
            return
        if self.name == "wait":
            (self.folder / f"waiting-{dist.get_rank()}").touch()
            while not getattr(self, "trainer")._checkpoints.flow.signals.received:  # noqa: B009
                time.sleep(0.05)
        elif self.name != "none" and dist.get_rank() == self.rank:
            os.kill(os.getpid(), getattr(signal, self.name))


def main(folder: Path, run: str, engine: str, name: str, rank: int, step: int) -> None:
    trainer = make_trainer(
        folder,
        loss="beta_dpo",
        model=str(folder / "llama-0"),
        train_dataset=make_pairs(24),
        trainer_options={
            "peft_config": LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        },
        per_device_train_batch_size=2,
        output_dir=str(folder / run),
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
        disable_dropout=False,
        step0_check="off",
        ddp_backend="gloo",
        deepspeed=deepspeed_config(int(engine[-1])) if engine.startswith("zero") else None,
    )
    sends = Sends(name, rank, step, folder)
    sends.trainer = trainer
    trainer.add_callback(sends)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    if trainer.is_world_process_zero():
        log = [
            {k: v for k, v in entry.items() if "loss" not in k or k == "loss"} for entry in trainer.state.log_history
        ]
        (folder / f"{run}.json").write_text(json.dumps({"world": dist.get_world_size(), "log": log}))
    dist.barrier()
    sys.stdout.flush()
    # Taking a gloo group down can deadlock with the interpreter's lock; everything is written by now.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]), int(sys.argv[6]))
