"""Rows that cannot be trained on at a given length, dropped with a warning. Imports datasets and pyarrow alone."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc  # type: ignore[import-untyped]
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
    fits = np.ones(len(dataset), bool) if limit is None else _prompt_lengths(dataset) < limit
    if not fits.all():
        dropped = np.flatnonzero(~fits).tolist()
        shown = ", ".join(map(str, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
        logger.warning(
            "dropped %d of %d rows of the %s set, whose prompts alone reach max_length=%d and leave no room for a "
            "completion (rows %s, from 0); raise max_length to keep them",
            *(len(dropped), len(dataset), name, max_length, shown),
        )
    fingerprint = Hasher.hash((dataset._fingerprint, max_length, truncation_mode))
    kept = range(len(dataset)) if fits.all() else np.flatnonzero(fits)
    return dataset.select(kept, new_fingerprint=fingerprint)


def _prompt_lengths(dataset: Dataset) -> npt.NDArray[np.int64]:
    """(N,) tokens of each prompt, without reading the tokens."""
    tables = dataset.select_columns(["prompt_ids"]).with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(table.column("prompt_ids")).to_numpy() for table in tables]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)


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
