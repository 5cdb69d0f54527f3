"""A digest of the rows of a data set: what a model card says the model was trained on.

It depends on what is in the rows, not on their order, their file, its format, or how libraries store them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, Json

from prefopt.data.canonical import encoded, rows_of
from prefopt.data.columns import kind_of_columns
from prefopt.data.groups import COMPLETIONS, SCORES
from prefopt.data.parts import tables
from prefopt.data.unused import MEDIA

CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "weight", "tools", "image", "images")
"""The columns of normalised rows that training reads; others, such as where a row came from, do not count."""

TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label", "weight")
"""Those of rows that have token ids and no texts."""


_GROUP_IDS = f"{COMPLETIONS}_ids"


def fingerprint(dataset: Dataset, columns: Iterable[str] = ()) -> str:
    """16 hex digits: the same for the same rows, different if any row was changed, added or repeated.

    Token ids count only in rows that have no texts.

    Args:
        dataset: normalised rows, or rows of token ids.
        columns: more columns that the objective reads.
    """
    form = kind_of_columns(dataset.column_names)
    known = TOKENISED if form is None else CONTENT
    if form == "group" or (form is None and _GROUP_IDS in dataset.column_names):
        known = (*known, _GROUP_IDS if form is None else COMPLETIONS, SCORES)
    names = [name for name in dict.fromkeys((*known, *columns)) if name in dataset.column_names]
    total = count = 0
    for row in _bytes_of_rows(dataset.select_columns(names)):
        # A sum does not depend on the order and, unlike an exclusive or, counts repeats.
        total += int.from_bytes(hashlib.blake2b(row, digest_size=16).digest(), "little")
        count += 1
    return hashlib.blake2b(f"{count} {total % 2**128}".encode(), digest_size=8).hexdigest()


def _bytes_of_rows(dataset: Dataset) -> Iterator[Any]:
    if any(name in MEDIA or _holds_json(feature) for name, feature in dataset.features.items()):
        # Pictures count as their pixels, JSON text as its value.
        yield from map(encoded, dataset.with_format(None))
        return
    for table in tables(dataset, dataset.column_names):
        yield from rows_of(table)


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    inner = getattr(feature, "feature", None)
    return _holds_json(inner) if inner is not None else isinstance(feature, Json)
