"""`dataset.map` for conversions of columns, with the types of the result stated and errors that name the columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

from prefopt.data.errors import DataError

PEEKED_ROWS = 64
"""Number of rows that decide how a column is written."""
MESSAGE = '{"role", "content"}'
MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def python_rows(dataset: Any) -> Any:
    """The set with rows of lists and numbers if they are tensors or arrays, whose `+` would add; others unchanged."""
    if isinstance(dataset, Dataset):
        return dataset if dataset.format["type"] in (None, "custom") else dataset.with_format(None)
    if not isinstance(dataset, IterableDataset):
        return dataset
    dataset = dataset.with_format(None)
    # A generator's rows are as it made them; others come from Arrow.
    return dataset.map(_python) if dataset.features is None else dataset


def _python(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _python(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return [_python(item) for item in value] if isinstance(value, list | tuple) else value


def map_rows(
    dataset: Dataset | IterableDataset,
    function: Callable[[dict[str, Any]], dict[str, Any]],
    changed: Mapping[str, Any],
    desc: str,
    remove: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """`dataset.map` of a function of one row, called for many rows at once.

    Args:
        dataset: rows.
        function: the columns that it changes, of a row; the same ones for every row.
        changed: the types of these columns, None to infer a type. Without them, a first batch of empty prompts would
            fix a wrong type.
        desc: for the progress bar and for errors.
        remove: columns that are taken out.
    """
    options: dict[str, Any] = {"remove_columns": list(remove)} if remove else {}
    if dataset.features is not None and all(feature is not None for feature in changed.values()):
        rest = {name: feature for name, feature in dataset.features.items() if name not in remove}
        options["features"] = Features({**rest, **changed})
    if not isinstance(dataset, Dataset):
        return dataset.map(function, **options)
    try:
        return dataset.map(partial(_of_batch, function=function), desc=desc, batched=True, **options)
    except DataError:
        raise
    except (TypeError, ValueError, ArrowException) as error:
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{desc}: the columns {', '.join(changed)} hold different kinds of values: {said}. Write every "
            f"text as a string, or every one as a list of {MESSAGE} messages."
        ) from error


def _of_batch(
    batch: Mapping[str, Sequence[Any]], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, list[Any]]:
    names, columns = list(batch), list(batch.values())
    changed = [function(dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
    return {name: [row[name] for row in changed] for name in changed[0]}
