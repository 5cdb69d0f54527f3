"""What each process does that samples into one file; started by `test_transformers.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from prefopt.generation.samples import PromptRow, SamplingSettings
from prefopt.generation.stage import sample_to_file
from prefopt.generation.transformers import TransformersGenerator
from tests.tiny import make_model, make_tokenizer


def write_samples(path: Path) -> None:
    torch.set_num_threads(1)
    prompts = [PromptRow([{"role": "user", "content": f"{number} + 1"}]) for number in range(11)]
    generator = TransformersGenerator(make_model(), make_tokenizer(), chunk_prompts=2)
    sample_to_file(generator, prompts, SamplingSettings(samples=3, max_new_tokens=8), path, round_number=1)


if __name__ == "__main__":
    PartialState(cpu=True)
    write_samples(Path(sys.argv[1]))
