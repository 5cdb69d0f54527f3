"""What each process does that samples from a model that an engine has sharded; started by `test_sharded.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from prefopt.generation.samples import PromptRow, SamplingSettings
from prefopt.generation.transformers import TransformersGenerator
from prefopt.models.load import load_model
from tests.processes import engine_options, wrapper_of
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, make_trainer

PROMPTS = [PromptRow([{"role": "user", "content": f"{number} + 1"}]) for number in range(5)]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=8)


def texts(model: object) -> list[str]:
    """Completions; the number of chunks is odd, so that one process runs the model oftener than the other."""
    generator = TransformersGenerator(model, make_tokenizer(), name="trained", chunk_prompts=1)
    return [sample.completion for group in generator.sample(PROMPTS, SETTINGS) for sample in group]


def main(folder: Path, engine: str) -> None:
    options = engine_options(engine)
    trainer = make_trainer(
        folder, loss="simpo", model=str(folder / "llama-0"), train_dataset=make_pairs(8), max_steps=2,
        learning_rate=1e-2, per_device_train_batch_size=2, output_dir=str(folder / "run"), **options,
    )  # fmt: skip
    trainer.train()
    drawn = texts(trainer.accelerator.unwrap_model(trainer.model_wrapped))
    trainer.evaluate(make_pairs(4))  # sharded again, with its hooks
    again = texts(trainer.accelerator.unwrap_model(trainer.model_wrapped))
    trainer.save_model(str(folder / "saved"))
    dist.barrier()
    whole = texts(load_model(str(folder / "saved"), {}))
    if dist.get_rank() == 0:
        results = {"wrapper": wrapper_of(trainer), "sharded": drawn, "again": again, "whole": whole}
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
