"""Probe pairs: a few tokenized rows, the same ones at each measurement. Imports scoring, never a trainer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.losses import Loss
from prefopt.losses.scores import GIVEN_LOGPS
from prefopt.safety.errors import UsageError
from prefopt.scoring import PreferenceCollator

PROBES = 16
"""Default number of pairs: a share of half of them has a standard error of 0.12."""


@dataclass(frozen=True)
class Probes:
    """A batch of N pairs.

    Attributes:
        batch: collated.
        rows: (N,) their row numbers.
        of: the set that they are from: `held-out` or `training`.
    """

    batch: Mapping[str, Any]
    rows: tuple[int, ...]
    of: str


def draw_probes(
    rows: Sequence[dict[str, Any]] | Dataset,
    loss: Loss,
    pad_token_id: int | None,
    *,
    count: int = PROBES,
    seed: int = 0,
    of: str = "held-out",
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    trust_logps: bool = True,
) -> Probes:
    """Draw pairs without replacement, the same ones for the same seed and set.

    Args:
        rows: with `prompt_ids`, `chosen_ids` and `rejected_ids`; fewer than `count` are all drawn.
        loss: whose columns are handed on.
        pad_token_id: the tokenizer's.
        count: how many.
        seed: of the draw.
        of: the name of the set, for findings.
        max_length, truncation_mode: as `PreferenceCollator` has them.
        trust_logps: whether log-probabilities that come with the rows are those of this run's reference.

    Raises:
        UsageError: for a stream, an empty set, or rows that are not tokenized pairs.
    """
    if isinstance(rows, IterableDataset):
        raise UsageError("probe pairs are drawn from a set of known size, and this one is a stream: pass a part of it")
    if not len(rows):
        raise UsageError("probe pairs are drawn from an empty set")
    if missing := {"prompt_ids", "chosen_ids", "rejected_ids"} - set(rows[0]):
        raise UsageError(
            f"probes are pairs of token ids; these rows have no {', '.join(sorted(missing))}: use data with chosen "
            "and rejected answers, tokenized by the trainer or prefopt.data.tokenize_dataset"
        )
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    collate = PreferenceCollator.for_loss(loss, pad_token_id, max_length=max_length, truncation_mode=truncation_mode)
    left_out = () if trust_logps else GIVEN_LOGPS
    pairs = [{name: value for name, value in rows[row].items() if name not in left_out} for row in drawn]
    return Probes(collate(pairs), tuple(drawn), of)
