"""What each process does whose micro-batches hold rows of one role alone; started by `test_empty_roles.py`."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset, load_from_disk
from peft import LoraConfig

from tests.processes import wrapper_of
from tests.trainer.runs import make_labelled, make_trainer


def labelled(labels: str) -> Dataset:
    """One row a letter: "r" to retain, "f" to forget."""
    data = make_labelled(len(labels)).remove_columns("label")
    return data.add_column("label", [letter == "r" for letter in labels])


def numbers(folder: Path, job: dict[str, object], name: str, processes: int) -> dict[str, object]:
    """What a job logs, and its weights after a step; the global batch is the same whatever the number of processes.

    Each process has its own half of a micro-batch: with "rf" one has a row to retain and the other a row to forget.
    """
    # On disk, as TRL writes what it computes ahead beside the data and every process reads it.
    data = load_from_disk(folder / f"data-{name}")
    adapter = LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM") if job.get("lora") else None
    options = {**job.get("options", {}), **({"ddp_backend": "gloo"} if processes > 1 else {})}
    # Some objectives are saturated on a random model: plain descent moves no float32 weight by gradients of 1e-8.
    options["step0_check"] = "off"
    if options.pop("cached", False):
        options["reference_cache"] = str(folder / f"cache-{name}-{processes}")
    each = len(job["labels"]) // processes // job.get("accumulate", 1)
    trainer = make_trainer(
        folder, loss=job["loss"], model=str(folder / "llama-0"), train_dataset=data,
        trainer_options={"peft_config": adapter, "eval_dataset": data}, output_dir=str(folder / f"{name}-{processes}"),
        per_device_train_batch_size=each, per_device_eval_batch_size=each, optim="sgd", learning_rate=0.05,
        gradient_accumulation_steps=job.get("accumulate", 1), max_grad_norm=0.0, max_steps=2,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    # Evaluated first, it is trained on all processes together all the same.
    assert processes == 1 or wrapper_of(trainer) == "DistributedDataParallel"
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    found = {
        "loss": first["loss"], "grad_norm": first["grad_norm"], "second": second["loss"],
        "eval_loss": before["eval_loss"], "weights": float(weights.double().norm()),
    }  # fmt: skip
    assert all(math.isfinite(v) for entry in (before, first, second) for v in entry.values()), (job, first)
    return found


def main(folder: Path) -> None:
    found = {
        name: numbers(folder, job, name, 2) for name, job in json.loads((folder / "jobs.json").read_text()).items()
    }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking a gloo group down can deadlock with the interpreter's lock


if __name__ == "__main__":
    main(Path(sys.argv[1]))
