"""A digest of the rows of a data set: what a model card says the model was trained on.

It depends on what is in the rows, not on their order, their file, its format, or how libraries store them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from prefopt.data.messages import without_nulls

CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "weight", "tools", "image", "images")
"""The columns of normalised rows that training reads; others, such as where a row came from, do not count."""

TOKENISED = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label", "weight")


def fingerprint(dataset: Dataset, columns: Iterable[str] = ()) -> str:
    """16 hex digits: the same for the same rows, different if any row was changed, added or repeated.

    Args:
        dataset: normalised rows, or rows of token ids.
        columns: more columns that the objective reads.
    """
    known = TOKENISED if "prompt_ids" in dataset.column_names else CONTENT
    names = [name for name in dict.fromkeys((*known, *columns)) if name in dataset.column_names]
    rows = sorted(_digest(row) for row in dataset.select_columns(names))
    return hashlib.blake2b(b"".join(rows), digest_size=8).hexdigest()


def _digest(row: dict[str, Any]) -> bytes:
    text = json.dumps(without_nulls(row), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_other)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _other(value: Any) -> Any:
    if hasattr(value, "tobytes"):  # a picture
        return hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
    return str(value)
