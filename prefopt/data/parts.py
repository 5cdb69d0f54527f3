"""A large set in parts, so that a pass over all rows does not hold all of its file in memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

ROWS_AT_ONCE = 1000
_PART_BYTES = 256_000_000


def parts(dataset: Dataset) -> Iterator[Dataset]:
    """The rows as data sets of about 256 MB, one after the other.

    Files of a set are mapped into memory, and pages that were read count as memory of the process until the mapping
    is closed. So each part of a set on disk is mapped on its own, and closed after use.
    """
    size, count = dataset.data.nbytes, len(dataset)
    if size <= _PART_BYTES or not dataset.cache_files:
        yield dataset
        return
    rows = max(count * _PART_BYTES // size, ROWS_AT_ONCE)
    # A pickled set has the paths of its files; here it is also how to map them again.
    pickled = pickle.dumps(dataset)
    for start in range(0, count, rows):
        yield pickle.loads(pickled).select(range(start, min(start + rows, count)))


def tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[Any]:
    """The rows as Arrow tables of a thousand rows."""
    for part in parts(dataset.select_columns(list(columns))):
        yield from part.with_format("arrow").iter(ROWS_AT_ONCE)
