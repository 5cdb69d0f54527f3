"""Rows that cannot be trained on at a given length, dropped with a warning. Imports datasets alone."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)


def drop_overlong(
    dataset: Dataset | IterableDataset,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    name: str = "train",
) -> Dataset | IterableDataset:
    """A tokenised dataset without the rows whose prompt alone fills `max_length`, which a warning counts and lists.

    With "keep_end" the prompt's start is cut instead, so every row stays. The result's fingerprint holds both
    settings, because results computed from the rows (such as reference log-probabilities) depend on them.
    """
    limit = max_length if max_length is not None and truncation_mode == "keep_start" else None
    if not isinstance(dataset, Dataset):
        return dataset if limit is None else dataset.filter(_warned_fit(limit, name))
    kept = list(range(len(dataset)))
    if limit is not None:
        kept = [i for i, ids in enumerate(dataset["prompt_ids"]) if len(ids) < limit]
    if len(kept) < len(dataset):
        dropped = sorted(set(range(len(dataset))) - set(kept))
        shown = ", ".join(map(str, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
        logger.warning(
            "dropped %d of %d rows of the %s set, whose prompts alone reach max_length=%d and leave no room for a "
            "completion (rows %s, from 0); raise max_length to keep them",
            *(len(dropped), len(dataset), name, max_length, shown),
        )
    fingerprint = Hasher.hash((dataset._fingerprint, max_length, truncation_mode))
    return dataset.select(kept, new_fingerprint=fingerprint)


class _warned_fit:
    """Whether a streamed row has room for a completion; warns once about rows without."""

    def __init__(self, max_length: int, name: str):
        self.max_length = max_length
        self.name = name
        self.warned = False

    def __call__(self, example: dict[str, Any]) -> bool:
        fits: bool = len(example["prompt_ids"]) < self.max_length
        if not fits and not self.warned:
            self.warned = True
            logger.warning(
                "the streamed %s set holds prompts that alone reach max_length=%d; such rows are skipped",
                *(self.name, self.max_length),
            )
        return fits
