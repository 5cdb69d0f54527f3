"""Short training runs on a tiny random model, shared by the trainer tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import set_seed

from prefopt import PreferenceConfig, PreferenceTrainer
from tests.tiny import make_model, make_tokenizer

_WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "bridge",
    "carries",
    "load",
    "Paris",
    "works",
)


def _words(rng: random.Random, most: int = 9) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, most)))


def make_pairs(n: int = 40, seed: int = 0, **columns: list[Any]) -> Dataset:
    """Conversational pairs of random words, of unequal lengths; `columns` are added as they are."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": [{"role": "user", "content": _words(rng)}],
            "chosen": [{"role": "assistant", "content": _words(rng)}],
            "rejected": [{"role": "assistant", "content": _words(rng)}],
        }
        for _ in range(n)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Dataset.from_list(rows)


def make_groups(n: int = 24, seed: int = 0, largest: int = 4, **columns: list[Any]) -> Dataset:
    """Conversations with two to `largest` answers each and a score an answer."""
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        texts = [f"{place} {_words(rng)}" for place in range(2 + number % (largest - 1))]
        rows.append(
            {
                "prompt": [{"role": "user", "content": _words(rng)}],
                "completions": [[{"role": "assistant", "content": text}] for text in texts],
                "scores": [round(rng.uniform(0, 3), 2) for _ in texts],
                **{name: values[number] for name, values in columns.items()},
            }
        )
    return Dataset.from_list(rows)


def make_labelled(n: int = 40, seed: int = 0) -> Dataset:
    """Single completions with a label, two of three desirable."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"prompt": _words(rng), "completion": " " + _words(rng), "label": i % 3 != 0} for i in range(n)]
    )


def save_model(folder: Path, architecture: str = "llama", seed: int = 0) -> str:
    """A tiny model and tokenizer on disk, since full fine-tuning loads its reference from there."""
    path = folder / f"{architecture}-{seed}"
    if not path.exists():
        make_model(architecture, seed).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return str(path)


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a ten-step float32 run on the CPU that logs every step."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 10,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **options,
    }


def make_trainer(
    folder: Path, *, trainer: Any = PreferenceTrainer, config: Any = PreferenceConfig, model: Any = None,
    train_dataset: Any = None, trainer_options: dict[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    model = save_model(folder) if model is None else model
    # TRL seeds itself before it makes an adapter since 1.15 only.
    set_seed(options.get("seed", 42))
    return trainer(
        model=model,
        args=config(**settings(folder, **options)),
        train_dataset=make_pairs() if train_dataset is None else train_dataset,
        processing_class=make_tokenizer(),
        **(trainer_options or {}),
    )


def require(engine: str) -> None:
    """Skip the test where DeepSpeed is not installed, or cannot be used."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    if engine == "zero3" and Version(trl.__version__) < Version("1.12"):
        pytest.skip("this TRL asks for device_map='auto' on a CPU too, which transformers refuses under ZeRO-3")


def train(*arguments: Any, **keywords: Any) -> list[dict[str, float]]:
    """Train and return the log entries of the steps."""
    trainer = make_trainer(*arguments, **keywords)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
