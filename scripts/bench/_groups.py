"""K answers of a prompt as one group, against the same answers as K - 1 pairs; `speed.py --groups` runs it.

The first answer is the best: the pairs are it against each other one, in two orders. "apart" is what a shuffled file
gives: every pair of a batch has a prompt of its own, which is computed for each of them. "together" puts the pairs of
a prompt into one batch, where the tree layout computes the prompt and the shared answer once, as it does for a group.
The three take turns in one process, each on a new model.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _job import Job, load_model, load_tokenizer, make_trainer, vocabulary, watch

ARMS = {"group": "plackett_luce", "pairs apart": "dpo", "pairs together": "dpo"}
"""What is compared, and its loss."""


def groups(job: Job, tokenizer: Any) -> list[dict[str, Any]]:
    """Groups of random words for the steps of a job, as many as the pairs apart need to fill their batches."""
    rng = random.Random(0)
    words, before = vocabulary(tokenizer), len(tokenizer("")["input_ids"])
    if len(words) < 10:
        raise ValueError(f"{job.model}: the tokenizer has no words of one token to make answers of; give --model")

    def text(tokens: int) -> str:
        return "".join(rng.choices(words, k=tokens))

    return [
        {
            "prompt": text(job.prompt - before),
            "completions": [text(job.completion - 1) for _ in range(job.completions)],
            "scores": [float(-place) for place in range(job.completions)],
        }
        for _ in range(max(job.pairs, job.steps * job.pairs // (job.completions - 1)))
    ]


def rows_of(arm: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an arm in the order of training."""
    if arm == "group":
        return list(rows)
    pairs = [
        [{"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": other} for other in others]
        for row in rows
        for others in [row["completions"][1:]]
    ]
    ordered = zip(*pairs, strict=True) if arm == "pairs apart" else pairs
    return [pair for line in ordered for pair in line]


@dataclass(frozen=True)
class Timed:
    """Seconds of the timed steps of one arm, over all turns."""

    arm: str
    seconds: list[float]
    cpu_seconds: list[float]


def run(job: Job, repeats: int, say: Callable[[str], None]) -> list[Timed]:
    """Measure the three arms in turns.

    Args:
        job: `pairs` a step, from `pairs / (completions - 1)` prompts.
        repeats: turns of each arm.
        say: prints a line.
    """
    import torch
    from datasets import Dataset

    torch.set_num_threads(job.threads)
    rows = groups(job, load_tokenizer(job))
    timed = {arm: Timed(arm, [], []) for arm in ARMS}
    for turn in range(repeats):
        for arm, loss in ARMS.items():
            seconds: list[float] = []
            cpu_seconds: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(
                    "prefopt", job, load_model(job), str(Path(folder)), rows=Dataset.from_list(rows_of(arm, rows)),
                    per_device_train_batch_size=job.pairs // (job.completions - 1) if arm == "group" else job.pairs,
                    loss=loss,
                )  # fmt: skip
                trainer.add_callback(watch(seconds, cpu_seconds, lambda gradient: None))
                trainer.train()
            # The first step compares layouts.
            timed[arm].seconds.extend(seconds[1:])
            timed[arm].cpu_seconds.extend(cpu_seconds[1:])
            say(f"{arm}, turn {turn + 1}: {statistics.median(seconds[1:]):.3g} s a step")
    return list(timed.values())


def markdown(job: Job, timed: Sequence[Timed]) -> str:
    """A table with the ratio to the group."""
    base = timed[0]
    lines = [
        f"prompt {job.prompt}, {job.completions} answers of {job.completion} tokens; {job.pairs} pairs, "
        f"{len(base.seconds)} timed steps each",
        "",
        "| the same answers as | s a step | processor s a step | to the group | in processor time |",
        "|---|---|---|---|---|",
    ]
    for one in timed:
        wall, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        ratios = wall / statistics.median(base.seconds), cpu / statistics.median(base.cpu_seconds)
        lines.append(f"| {one.arm} | {wall:.3g} | {cpu:.3g} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
    return "\n".join(lines)
