"""Tokens a second of prefopt's sampling against TRL's and a plain `generate` loop, on the same prompts.

    python scripts/bench/sampling.py                         # the bundled model on a CPU
    python scripts/bench/sampling.py --model NAME --rows 256 # on a GPU too

Every way draws K samples of each prompt at temperature 1 with the same batch size and maximum length, from the same
weights. TRL's way is what its online trainers call: `GRPOTrainer._generate_single_turn` on prompts repeated K times;
`trl-continuous` is the same with `use_transformers_continuous_batching`. A token counts up to the end of its
completion, so that padding does not. The ways take turns, and a row of the table is the median of the turns;
processor seconds are those of the whole process, which matter where other jobs share the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from prefopt.demo.data import read_rows
from prefopt.generation.prompts import end_tokens, prompt_ids
from prefopt.generation.samples import PromptRow, SamplingSettings
from prefopt.generation.transformers import TransformersGenerator
from prefopt.models.bundled import resolve_demo_model
from prefopt.models.load import load_model, load_tokenizer

Way = Callable[[int], int]
"""Draws all samples with a seed, and says how many tokens they have."""


def mixed_prompts(count: int) -> list[PromptRow]:
    """Demo prompts: every other one alone, the others after zero to three earlier turns."""
    earlier = [[*row["prompt"], *row["chosen"]] for row in read_rows("train")]
    rows = read_rows("heldout")
    prompts = []
    for number in range(count):
        turns = (number // 2) % 4 if number % 2 else 0
        history = [message for at in range(turns) for message in earlier[number * 4 + at]]
        prompts.append(PromptRow([*history, *rows[number % len(rows)]["prompt"]]))
    return prompts


def ours(model: Any, tokenizer: Any, prompts: Sequence[PromptRow], job: argparse.Namespace) -> Way:
    generator = TransformersGenerator(model, tokenizer, name="bench", rows_at_once=job.rows, chunk_prompts=job.prompts)

    def draw(seed: int) -> int:
        settings = SamplingSettings(job.samples, max_new_tokens=job.max_new_tokens, seed=seed)
        return sum(sample.token_count for group in generator.sample(prompts, settings) for sample in group)

    return draw


def plain(model: Any, tokenizer: Any, prompts: Sequence[PromptRow], job: argparse.Namespace) -> Way:
    ends = end_tokens(model, tokenizer)
    ids = [prompt_ids(row, tokenizer) for row in prompts for _ in range(job.samples)]
    model.eval()

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
        for at in range(0, len(ids), job.rows):
            batch = tokenizer.pad({"input_ids": ids[at : at + job.rows]}, padding_side="left", return_tensors="pt")
            out = model.generate(
                **batch.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=job.max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            total += sum(count(row, ends) for row in out[:, batch["input_ids"].shape[1] :].tolist())
        return total

    return draw


def count(tokens: list[int], ends: Sequence[int]) -> int:
    return next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))


def trl(model: Any, tokenizer: Any, prompts: Sequence[PromptRow], job: argparse.Namespace, continuous: bool) -> Way:
    ids = [prompt_ids(row, tokenizer) for row in prompts for _ in range(job.samples)]
    ends = end_tokens(model, tokenizer)
    args = GRPOConfig(
        tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), bf16=False, report_to="none", temperature=1.0,
        num_generations=job.samples, per_device_train_batch_size=job.rows, max_completion_length=job.max_new_tokens,
        gradient_checkpointing=False, use_transformers_continuous_batching=continuous, beta=0.0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in prompts]),
    )  # fmt: skip

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
        for at in range(0, len(ids), job.rows):
            completions, _ = trainer._generate_single_turn(ids[at : at + job.rows], None, {}, job.samples)
            total += sum(count(list(row), ends) for row in completions)
        return total

    return draw


def measure(way: Way, seed: int) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    tokens = way(seed)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"tokens": tokens, "wall": tokens / wall, "processor": tokens / processor}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and the median of ours over theirs within each turn."""
    lines = ["| way | tokens | tokens/s | tokens/processor s | ours is faster by |", "|---|---|---|---|---|"]
    for name, turns in results.items():
        medians = [statistics.median(turn[key] for turn in turns) for key in ("tokens", "wall", "processor")]
        ratios = [mine["processor"] / its["processor"] for mine, its in zip(results["ours"], turns, strict=True)]
        lines.append(
            f"| {name} | {medians[0]:.0f} | {medians[1]:.1f} | {medians[2]:.1f} | {statistics.median(ratios):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the bundled one if left out")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="samples in a batch, the same for all ways")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["ours", "plain", "trl"], help="also trl-continuous")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    job = parser.parse_args()
    name = job.model or str(resolve_demo_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(name, {"dtype": torch.float32}).to(device), load_tokenizer(name)
    prompts = mixed_prompts(job.prompts)
    makers: dict[str, Callable[[], Way]] = {
        "ours": lambda: ours(model, tokenizer, prompts, job),
        "plain": lambda: plain(model, tokenizer, prompts, job),
        "trl": lambda: trl(model, tokenizer, prompts, job, continuous=False),
        "trl-continuous": lambda: trl(model, tokenizer, prompts, job, continuous=True),
    }
    lengths = sorted(len(prompt_ids(row, tokenizer)) for row in prompts)
    print(f"{job.prompts} prompts of {lengths[0]} to {lengths[-1]} tokens, {job.samples} samples each, {device}")
    ways = {way: makers[way]() for way in dict.fromkeys(["ours", *job.ways])}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(job.turns):
        for way, draw in ways.items():
            results[way].append(measure(draw, turn))
            print(f"turn {turn}, {way}: {results[way][-1]}", flush=True)
    print(table(results))
    if job.out:
        job.out.write_text(json.dumps({**vars(job), "out": str(job.out), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
