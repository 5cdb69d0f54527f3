"""The demo's preference pairs, as they ship in the package: made by `scripts/make_demo_data.py`, checked on each load.

Rows are conversational (`prompt`, `chosen`, `rejected` are lists of messages), so TRL's trainers take them as is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from prefopt.safety.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_FOLDER = Path(__file__).parent / "data"

Split = Literal["train", "heldout"]
Messages = list[dict[str, str]]


def load_demo(split: Split) -> Dataset:
    """The pairs of one split (`train` or `heldout`), with columns `prompt`, `chosen` and `rejected`."""
    from datasets import Dataset

    return Dataset.from_list(read_rows(split))


def load_demo_groups(split: Split) -> Dataset:
    """The same pairs as groups of two, with scores 1 and 0, for losses over groups."""
    from datasets import Dataset

    return Dataset.from_list([
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]}
        for row in read_rows(split)
    ])  # fmt: skip


def heldout_prompts() -> list[Messages]:
    """The held-out prompts, for greedy answers before and after training; the training pairs have other subjects."""
    return [row["prompt"] for row in read_rows("heldout")]


def read_rows(split: Split) -> list[dict[str, Any]]:
    """The rows of one split as plain Python; an error if the file is not the shipped one."""
    if split not in get_args(Split):
        raise UsageError(f"no demo split {split!r}: there are {' and '.join(get_args(Split))}.")
    file = DATA_FOLDER / f"{split}.jsonl"
    content = file.read_bytes()
    expected = metadata()["files"][file.name]["sha256"]
    if hashlib.sha256(content).hexdigest() != expected:
        raise UsageError(
            f"{file} is not the demo data that was shipped: its SHA-256 differs from the one in metadata.json. "
            "Reinstall prefopt, or make the data again with scripts/make_demo_data.py."
        )
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


def metadata() -> dict[str, Any]:
    """How the data was made: model, rule, seed, sampling settings, counts and checksums."""
    loaded: dict[str, Any] = json.loads((DATA_FOLDER / "metadata.json").read_text(encoding="utf-8"))
    return loaded
