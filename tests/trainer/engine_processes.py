"""What each process of a run under an engine does; started by `test_engines.py` and its neighbours."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from prefopt.losses.scores import EMBEDDINGS
from prefopt.scoring.rows import RowBatch
from prefopt.trainer.engine import describe_engine
from tests.processes import engine_options, wrapper_of
from tests.trainer.runs import make_groups, make_pairs, make_trainer

GLOBAL_BATCH = 8


def build(folder: Path, engine: str, job: dict[str, Any], processes: int) -> Any:
    """The trainer of a job; its global batch is the same whatever the number of processes."""
    options = {"gradient_accumulation_steps": 1, **job.get("options", {})}
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    data = DATA[job.get("data", "pairs")]
    train = data(job.get("rows", 32))
    if processes == 1:
        # What accelerate does on several: it fills the last batch up with the first rows.
        train = train.select([*range(len(train)), *range(-len(train) % GLOBAL_BATCH)])
    return make_trainer(
        folder,
        loss=job["loss"],
        model=str(folder / "llama-0"),
        train_dataset=train,
        trainer_options={"peft_config": adapter if job["kind"] == "lora" else None, "eval_dataset": data(7, seed=1)},
        **{
            "per_device_train_batch_size": GLOBAL_BATCH // processes // options["gradient_accumulation_steps"],
            "per_device_eval_batch_size": 4 // processes,
            "max_steps": 3,
            "seed": 1,
            # A step of plain descent moves weights as far as the gradient says. Adam's first steps are of one size
            # whatever the gradient, so they would make much of rounding where it is next to nothing.
            "optim": "sgd",
            "learning_rate": 0.5,
            "max_grad_norm": 0.3,
            "output_dir": str(folder / f"{job['name']}-{engine}"),
            "reference_cache": str(folder / f"cache-{job['kind']}-{engine}") if job.get("cached") else "off",
            **engine_options(engine, sharded_checkpoints=job["kind"] == "lora"),
            **options,
        },
    )


def weighted(n: int, seed: int = 0) -> Any:
    return make_pairs(n, seed, weight=[(0.5, 1.0, 0.0, 2.0, 1.5)[i % 5] for i in range(n)])


def labelled(n: int, seed: int = 0) -> Any:
    """Single completions whose prompts and weights come round every second row, two of three desirable.

    In the order of the data, a completion is then moved to the same prompt, in a row of the same weight, whichever
    process has that row.
    """
    from datasets import Dataset

    pairs = make_pairs(n, seed, weight=[(0.5, 2.0)[i % 2] for i in range(n)])
    rows = [
        {
            "prompt": pairs[i % 2]["prompt"],
            "completion": pairs[i]["chosen"],
            "label": i % 3 != 0,
            "weight": pairs[i]["weight"],
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def embedded(n: int, seed: int = 0) -> Any:
    """Pairs of unequal weights with vectors of their own, whose coordinates vary unequally."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 2, 6)
    rows = {name: (torch.randn(n, 6, generator=draw) * spread).tolist() for name in EMBEDDINGS}
    return make_pairs(n, seed, weight=[(0.5, 1.0, 0.0, 2.0, 1.5)[i % 5] for i in range(n)], **rows)


def grouped(n: int, seed: int = 0) -> Any:
    """Groups of two to five completions and of unequal weights; many scores are equal, in some groups all."""
    rows = make_groups(n, seed, largest=5, weight=[(0.5, 1.0, 0.0, 2.0, 1.5)[i % 5] for i in range(n)])
    return rows.map(lambda row: {"scores": [float(score > 1) for score in row["scores"]]})


def listed(n: int, seed: int = 0) -> Any:
    """The same without scores, in order."""
    return grouped(n, seed).remove_columns("scores")


DATA = {
    "pairs": make_pairs, "weighted": weighted, "labelled": labelled, "embedded": embedded, "groups": grouped,
    "lists": listed,
}  # fmt: skip


def whole_parameters(trainer: Any) -> dict[str, Tensor]:
    """Every trained parameter of the model, put together from all processes' pieces."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        if hasattr(value, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([value]):
                found[name] = value.detach().clone()
        elif hasattr(value, "full_tensor"):
            found[name] = value.detach().full_tensor().clone()
        else:
            found[name] = value.detach().clone()
    return found


def scores_of(trainer: Any) -> dict[str, list[float]]:
    """Log-probabilities of the first four evaluation rows as the trainer scores them, policy and reference."""
    rows = [trainer.eval_dataset[i] for i in range(4)]
    trainer.model.eval()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        batch = trainer._score(trainer.model_wrapped, RowBatch.of(inputs), all_logits=False).batch
    return {"logps": batch.chosen.logps.tolist(), "ref_logps": batch.chosen.ref_logps.tolist()}


def run(folder: Path, engine: str, job: dict[str, Any]) -> None:
    """Train, evaluate, and write what came of it into `folder`: NAME-ENGINE.json and NAME-ENGINE.safetensors.

    Args:
        folder: with the model in it.
        engine: one of `ENGINES`, or "plain" for one process without any.
        job: `name`; `kind`, "full" or "lora"; `loss`; `data`, a name in `DATA`; `rows`, how many of it to train on;
            `options`, further training arguments; `cached`, with a reference cache of its own; `save`, save the model
            and score some rows; `resumes`, the name of a job whose checkpoint of step 2 it starts from.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1 if engine == "plain" else 2
    trainer = build(folder, engine, job, processes)
    at_first = describe_engine(trainer)
    checkpoint = folder / f"{job['resumes']}-{engine}" / "checkpoint-2" if "resumes" in job else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    found = {
        "world": trainer.accelerator.num_processes,
        "wrapper": wrapper_of(trainer),
        "in words": [at_first, describe_engine(trainer)],
        "layout": [str(trainer._scorer.layout.masks), trainer._scorer.layout.call.chunked_head],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "misses": gather_object([0 if (cache := trainer._scorer.cache) is None else cache.misses]),
        "evaluation": trainer.evaluate(),
    }
    if job.get("save"):
        trainer.save_model(str(folder / f"{job['name']}-{engine}-saved"))
        found |= scores_of(trainer)
    parameters = whole_parameters(trainer)
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in parameters.items()}, folder / f"{job['name']}-{engine}.safetensors")
        (folder / f"{job['name']}-{engine}.json").write_text(json.dumps(found))


def main(folder: Path, engine: str) -> None:
    for job in json.loads((folder / "jobs.json").read_text()):
        run(folder, engine, job)
    dist.barrier()
    # Taking a gloo group down can deadlock with the interpreter's lock (torch joins its threads while holding it),
    # or abort at exit; everything is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
