"""Values inside columns, named by a path: `question.full_text`, `output.0`, also through JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset


def value_at(row: Any, path: str) -> Any:
    """The value at `path`, or None."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for name in path.split("."):
        row = parsed(row)
        if isinstance(row, list):
            row = row[int(name)] if name.isdigit() and int(name) < len(row) else None
        else:
            row = row.get(name) if isinstance(row, Mapping) else None
    return row


def feature_at(dataset: Dataset | IterableDataset, path: str) -> Any:
    """The type of the value there; None if it is not known."""
    feature: Any = dataset.features
    for name in path.split("."):
        if name.isdigit():
            feature = getattr(feature, "feature", None)
        else:
            feature = feature.get(name) if isinstance(feature, Mapping) else None
    return feature


def fields_of(row: Mapping[str, Any]) -> list[str]:
    """The paths of the fields of a row's objects."""
    objects = {name: parsed(value) for name, value in row.items()}
    return [f"{name}.{field}" for name, value in objects.items() if isinstance(value, Mapping) for field in value]


def parsed(value: Any) -> Any:
    """The object or the list that a text is the JSON of; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
