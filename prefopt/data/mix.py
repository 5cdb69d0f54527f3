"""Several sources in one set: parses `a.jsonl:0.7,b.jsonl:0.3` and draws rows with those weights.

Every mixed row says where it came from, in the columns `source` and `row`, so that reports can name it. It may
import datasets and this folder's schema and errors.
"""

from __future__ import annotations

import math
import os
import random
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from prefopt.data.columns import column_names, first_rows
from prefopt.data.errors import DataError
from prefopt.data.groups import COMPLETIONS, SCORES
from prefopt.data.schema import kind

Source = tuple[str, float | None]


def parse_sources(text: str) -> list[Source]:
    """`"a.jsonl:0.7,b.jsonl:0.3"` -> `[("a.jsonl", 0.7), ("b.jsonl", 0.3)]`; the weight is None without a number.

    All sources have a weight or none has. Weights are relative: `7` and `3` mean the same as `0.7` and `0.3`.
    """
    if os.path.isfile(text):  # a name may hold commas
        return [(text, None)]
    sources: list[Source] = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            raise DataError(
                f"Sources {text!r}: there is an empty entry between commas. Write NAME:WEIGHT,NAME:WEIGHT."
            )
        sources.append(_parse_source(part, text))
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"Sources {text!r}: {name!r} is given twice. Give it once, with the sum of the weights.")
    if len({weight is None for _, weight in sources}) > 1:
        bare = [name for name, weight in sources if weight is None]
        raise DataError(f"Sources {text!r}: {bare[0]!r} has no weight while others have. Weigh all of them or none.")
    return sources


def _parse_source(part: str, text: str) -> Source:
    name, colon, weight = part.rpartition(":")
    # A colon may also belong to the name: a file that exists as written, a Windows drive, a URL.
    if not colon or Path(part).exists() or "/" in weight or "\\" in weight:
        return part, None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"Sources {text!r}: the weight {weight!r} of {name!r} is not a number above 0.")
    return name, value


def with_origin(dataset: Dataset | IterableDataset, source: str) -> Dataset | IterableDataset:
    """Adds `source` (its name) and `row` (the number of the row in it, from 0).

    A `source` column in the dataset is added to the name, as in `a.jsonl:math`. A dataset that already has both
    columns is returned unchanged.
    """
    names = column_names(dataset)
    if "source" in names and "row" in names:
        return dataset
    own_source, own_row = "source" in names, "row" in names
    if isinstance(dataset, Dataset) and not own_source:
        dataset = dataset.add_column("source", [source] * len(dataset))
        return dataset if own_row else dataset.add_column("row", np.arange(len(dataset)))

    def add(example: dict[str, Any], index: int) -> dict[str, Any]:
        label = f"{source}:{example['source']}" if own_source else source
        return {"source": label} if own_row else {"source": label, "row": index}

    if dataset.features is None:
        return dataset.map(add, with_indices=True)
    added = {"source": Value("string")} if own_row else {"source": Value("string"), "row": Value("int64")}
    return dataset.map(add, with_indices=True, features=Features({**dataset.features, **added}))


def mix(
    sources: Mapping[str, Dataset | IterableDataset], weights: Sequence[float] | None = None, seed: int = 0
) -> Dataset | IterableDataset:
    """One dataset of normalised `sources` (name -> dataset), drawn at random in proportion to `weights`.

    Drawing continues until every source was used completely, so no row is lost; a source that ends earlier
    starts again (with the weights 0.9 and 0.1 and equal sizes, the first is used about nine times). Without weights
    every row comes exactly once: shuffled, or for streams one source after the other. Deterministic for a seed.
    """
    if not sources:
        raise DataError("There is no source to mix. Name at least one.")
    if weights is not None and len(weights) != len(sources):
        raise DataError(
            f"{len(sources)} sources ({', '.join(sources)}) and {len(weights)} weights. Give one for each."
        )
    for name, dataset in sources.items():
        if not first_rows(dataset, 1):
            raise DataError(f"Source {name!r} has no rows. Leave it out of the mixture.")
    parts = [with_origin(dataset, name) for name, dataset in sources.items()]
    if len(parts) == 1:
        return parts[0]
    _check_alike(dict(zip(sources, parts, strict=True)))
    parts = _align(parts)
    if weights is None:
        joined = datasets.concatenate_datasets(parts)
        return joined.shuffle(seed=seed) if isinstance(joined, Dataset) else joined
    total = math.fsum(weights)
    probabilities = [weight / total for weight in weights]
    if isinstance(parts[0], Dataset):
        return _draw(parts, probabilities, seed)
    return datasets.interleave_datasets(
        parts, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
    )


def in_proportion(sources: Mapping[str, Dataset], weights: Sequence[float], seed: int = 0) -> dict[str, Dataset]:
    """Rows of each source in proportion to its weight, drawn at random, none twice: a mixture to measure.

    Rows get their origin before the draw, as in `with_origin`.
    """
    total = min(len(dataset) / weight for dataset, weight in zip(sources.values(), weights, strict=True))
    drawn = {}
    for (name, dataset), weight in zip(sources.items(), weights, strict=True):
        count = min(max(round(total * weight), 1), len(dataset))
        drawn[name] = with_origin(dataset, name).shuffle(seed=seed).select(range(count))
    return drawn


def _draw(parts: list[Dataset], probabilities: list[float], seed: int) -> Dataset:
    # Our own draw, not `interleave_datasets`: the same order for every release of datasets and numpy.
    rng = random.Random(seed)
    offsets = [sum(len(part) for part in parts[:position]) for position in range(len(parts))]
    drawn = [0] * len(parts)
    indices = array("q")
    unseen = len(parts)
    while unseen:
        (which,) = rng.choices(range(len(parts)), probabilities)
        indices.append(offsets[which] + drawn[which] % len(parts[which]))
        drawn[which] += 1
        unseen -= drawn[which] == len(parts[which])
    return datasets.concatenate_datasets(parts).select(np.frombuffer(indices, np.int64))


def _check_alike(sources: Mapping[str, Dataset | IterableDataset]) -> None:
    """All pairs or all unpaired, all messages or all plain text: a batch cannot hold both."""
    seen: dict[str, str] = {}
    for name, dataset in sources.items():
        form: str = kind(dataset)
        completion = {"pair": "chosen", "unpaired": "completion", "group": COMPLETIONS}[form]
        values = [row[completion] for row in first_rows(dataset, 64)]
        if form == "group":
            values = [text for texts in values if isinstance(texts, list) for text in texts]
            form += " with scores" if SCORES in column_names(dataset) else " in order"
        style = "plain text" if any(isinstance(value, str) for value in values) else "messages"
        seen[name] = f"{form} rows as {style}"
    if len(set(seen.values())) > 1:
        listing = "; ".join(f"{name}: {what}" for name, what in seen.items())
        raise DataError(f"These sources cannot be mixed: {listing}. Convert them to one format first.")


def _align(parts: list[Dataset | IterableDataset]) -> list[Dataset | IterableDataset]:
    """Gives all parts the same columns and types: a missing `weight` is 1, any other missing column null."""
    weighted = [part for part in parts if "weight" in column_names(part)]
    if weighted and len(weighted) < len(parts):
        parts = [part if "weight" in column_names(part) else _with_weight_one(part) for part in parts]
    if any(part.features is None for part in parts):
        return parts
    target: dict[str, Any] = {}
    for part in parts:
        for name, feature in part.features.items():
            target[name] = _wider(target[name], feature) if name in target else feature
    aligned = []
    for part in parts:
        wanted = Features({name: target[name] for name in part.features})
        aligned.append(part if part.features == wanted else part.cast(wanted))
    return aligned


def _with_weight_one(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset):
        return dataset.add_column("weight", np.ones(len(dataset)))
    return dataset.map(_weight_one)


def _weight_one(row: dict[str, Any]) -> dict[str, Any]:
    return {"weight": 1.0}


def _wider(left: Any, right: Any) -> Any:
    """A type that both fit: messages of one source may have fields (tool calls) that the other's lack."""
    if left == right:
        return left
    if isinstance(left, Value) and isinstance(right, Value):
        by_width = ("null", "bool", "int64", "float32", "float64", "string", "large_string")
        known = [dtype for dtype in by_width if dtype in (left.dtype, right.dtype)]
        return Value(known[-1]) if len(known) == 2 else left
    inner_left, inner_right = getattr(left, "feature", None), getattr(right, "feature", None)
    if inner_left is not None and inner_right is not None:
        return type(left)(_wider(inner_left, inner_right))
    if isinstance(left, dict) and isinstance(right, dict):
        both = left.keys() & right.keys()
        return {**left, **right, **{name: _wider(left[name], right[name]) for name in both}}
    # A column of nulls takes the other's type; free-form JSON holds everything.
    if isinstance(left, Value) and left.dtype == "null":
        return right
    return right if type(right).__name__ == "Json" else left
