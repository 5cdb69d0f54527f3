"""Held-out rows: the data's own held-out split, else training rows, whole prompts at a time."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from prefopt.data import parse_sources
from prefopt.data.parts import ROWS_AT_ONCE, parts
from prefopt.recipe.arguments import Recipe

USUAL = "test"
OTHERS = ("validation", "valid", "val", "dev", "eval")
"""Names of held-out splits other than `test`."""

_KEY = 48
"""Bytes of a prompt in memory while prompts are sorted."""


def own_split(recipe: Recipe, load: Callable[[str], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The name of the data's held-out split and its rows by source; both empty if there is none (a local file)."""
    script = recipe.script
    if any(Path(name).is_file() for name, _ in parse_sources(str(script.dataset_name))):
        return "", {}
    wanted = script.dataset_test_split
    try:
        return wanted, load(wanted)
    except ValueError as error:
        if "split" not in str(error) or wanted != USUAL:  # another name was requested
            raise
        # The error lists the existing splits.
        others = [name for name in OTHERS if f"'{name}'" in str(error) and name != script.dataset_train_split]
    if not others:
        return "", {}
    recipe.console.print(
        f"The data has no split {wanted!r}: its split {others[0]!r} is held out (--dataset_test_split names another)."
    )
    return others[0], load(others[0])


def tell_shared_prompts(recipe: Recipe, split: str, train: dict[str, Dataset], heldout: dict[str, Dataset]) -> None:
    """Print how many rows of the data's own held-out split have a prompt that is trained on."""
    trained = {_digest(text) for source in train.values() for text in _prompts(source)}
    held = [_digest(text) in trained for source in heldout.values() for text in _prompts(source)]
    if any(held):
        recipe.console.print(
            f"{sum(held)} of the {len(held)} rows of the split {split!r} have a prompt that is trained on too: what "
            "is measured on them is too good. Take them out of one of the two.",
            soft_wrap=True,
        )


def hold_out(recipe: Recipe, sources: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Split off rows of every source, in proportion to its size; at most a fifth of each.

    Rows with the same prompt stay together, in all sources: no held-out prompt is trained on.
    """
    script, training = recipe.script, recipe.training
    total = sum(len(source) for source in sources.values())
    if not script.eval_rows or not total:
        return sources, {}
    room = Counter({n: min(round(script.eval_rows * len(s) / total), len(s) // 5) for n, s in sources.items()})
    with tempfile.TemporaryFile() as scratch:
        prompts = _Prompts(sources, scratch)
        in_order = prompts.in_order()
    places = list(range(len(in_order)))
    random.Random(training.data_seed or training.seed).shuffle(places)
    apart: dict[str, list[int]] = {name: [] for name in sources}
    held = 0
    for place in places:
        rows = prompts.rows_of(in_order[place])
        taken = Counter(name for name, _ in rows)
        if all(count <= room[name] for name, count in taken.items()):
            room -= taken
            held += 1
            for name, row in rows:
                apart[name].append(row)
        if not room:
            break
    return _split(recipe, sources, apart, held, shared=total > len(in_order))


class _Prompts:
    """Every prompt of some sources, with its rows. Texts are in a file: they may be as large as memory.

    Args:
        sources: by name.
        file: an empty binary file.
    """

    def __init__(self, sources: dict[str, Dataset], file: Any):
        self._names, digests, ends, shared = list(sources), [], [0], None
        for text in itertools.chain.from_iterable(map(_prompts, sources.values())):
            shared = text if shared is None else shared[: _shared_length(shared, text)]
            digests.append(_digest(text))
            ends.append(ends[-1] + file.write(text))
        file.flush()
        self._file, self._ends, self._start = file, np.array(ends), len(shared or b"")
        of_rows = pa.array(digests, pa.binary(16)).dictionary_encode()
        self._numbers = of_rows.indices.to_numpy()
        self._count = len(of_rows.dictionary)
        self._by_prompt = np.argsort(self._numbers, kind="stable")
        self._firsts = np.searchsorted(self._numbers[self._by_prompt], np.arange(self._count + 1))
        self._offsets = np.cumsum([0, *map(len, sources.values())])

    def rows_of(self, number: int) -> list[tuple[str, int]]:
        """The source and row of every row with a prompt."""
        rows = self._by_prompt[self._firsts[number] : self._firsts[number + 1]]
        which = np.searchsorted(self._offsets, rows, side="right") - 1
        return [(self._names[at], int(row - self._offsets[at])) for at, row in zip(which, rows, strict=True)]

    def in_order(self) -> list[int]:
        """The numbers of the prompts, sorted by their JSON text."""
        first_rows = self._by_prompt[self._firsts[:-1]]
        spans = list(zip(self._ends[first_rows].tolist(), self._ends[first_rows + 1].tolist(), strict=True))

        # Read, not mapped: pages of a mapped file count as memory of the process.
        def text(number: int, skipped: int = 0, most: int | None = None) -> bytes:
            start, end = spans[number]
            length = end - start - skipped
            self._file.seek(start + skipped)
            read: bytes = self._file.read(length if most is None else min(length, most))
            return read

        def compare(left: int, right: int) -> int:
            one, other = text(left), text(right)
            return (one > other) - (one < other)

        # Sorted by a few bytes where they first differ, then by whole texts where these are equal.
        keys = np.array([text(number, self._start, _KEY) for number in range(self._count)])
        order = np.argsort(keys, kind="stable").tolist()
        equal = itertools.groupby(order, key=lambda number: bytes(keys[number]))
        return [number for _, group in equal for number in sorted(group, key=functools.cmp_to_key(compare))]


def _prompts(source: Dataset) -> Iterator[bytes]:
    for part in parts(source.select_columns("prompt")):
        for batch in part.iter(ROWS_AT_ONCE):
            yield from (json.dumps(prompt, sort_keys=True, default=str).encode() for prompt in batch["prompt"])


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _shared_length(left: bytes, right: bytes) -> int:
    if right.startswith(left):
        return len(left)
    return next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(right))


def _split(
    recipe: Recipe, sources: dict[str, Dataset], apart: dict[str, list[int]], prompts: int, shared: bool
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    total = sum(len(source) for source in sources.values())
    count = sum(map(len, apart.values()))
    of = f" with all rows of {prompts} prompts" if shared else ""
    if count:
        recipe.console.print(
            f"The data has no split {recipe.script.dataset_test_split!r}: {count} of its {total} rows "
            f"{'is' if count == 1 else 'are'} held out{of} (--eval_rows 0 trains on all).",
            soft_wrap=True,
        )
    elif shared:
        recipe.console.print(
            f"No rows are held out: the data has no split {recipe.script.dataset_test_split!r}, and every prompt has "
            "more rows than may be held out.",
            soft_wrap=True,
        )
    rest = {}
    for name, source in sources.items():
        out = np.array(apart[name], np.int64)
        rest[name] = source.select(np.setdiff1d(np.arange(len(source)), out)) if len(out) else source
    return rest, {name: sources[name].select(sorted(rows)) for name, rows in apart.items() if rows}
