"""Small runs of rounds on a tiny model, for the tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.trainer.runs import save_model

WORDS = ["quick", "brown", "fox", "bridge", "load", "gap", "capital", "paris", "good", "day", "hello", "there"]


def vowels(completion: str) -> float:
    """A judge: the share of vowels."""
    return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


def even(completion: str) -> float:
    """A judge: 1 for an even number of letters, 0 for an odd one."""
    return float(len(completion) % 2 == 0)


def digits(completion: str) -> float:
    """A judge: the sum of the digits."""
    return sum(int(letter) for letter in completion if letter.isdigit())


def broken(completion: str) -> float:
    """A judge that fails on every second length, and abstains never."""
    if len(completion) % 2:
        raise KeyError("odd")
    return float(len(completion))


def longer(first: str, second: str) -> float:
    """A judge of two completions."""
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))


def write_prompts(path: Path, count: int, ending: str, **columns: str) -> str:
    rng = random.Random(ending)
    texts = [f"{' '.join(rng.choices(WORDS, k=4))} {ending}{number}" for number in range(count)]
    rows = ({"prompt": [{"role": "user", "content": text}], **columns} for text in texts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(folder: Path, *more: str, output: str = "out", prompts: int = 6, **options: Any) -> list[str]:
    """The command line of a small run; `options` replace its own, and None leaves one out."""
    settings = {
        "model_name_or_path": save_model(folder),
        "prompts": write_prompts(folder / "prompts.jsonl", prompts, "t", gold="a good day"),
        "heldout_prompts": write_prompts(folder / "heldout.jsonl", 3, "h"),
        "output_dir": str(folder / output),
        "judges": "tests.online.rounds:vowels",
        "loss": "irpo(beta=0.1)",
        "rounds": 2,
        "samples": 4,
        "max_new_tokens": 6,
        "unfinished": "keep",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
        **options,
    }
    given = {name: str(value).split("|") for name, value in settings.items() if value is not None}
    return [*(word for name, values in given.items() for word in (f"--{name}", *values)), *more]


def files(run: Path) -> dict[str, bytes]:
    """The files of a run, but for its models and the optimizer's state."""
    kinds = (path for path in run.rglob("*") if path.is_file() and path.suffix != ".pt" and "model" not in path.parts)
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(kinds)}


def weights(run: Path, number: int) -> dict[str, Any]:
    folder = run / f"round-{number}" / "model"
    names = ("model.safetensors", "adapter_model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).exists()))


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)
