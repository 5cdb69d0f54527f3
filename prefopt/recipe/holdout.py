"""Held-out rows: the data's own held-out split, else training rows, whole prompts at a time."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefopt.data import parse_sources
from prefopt.recipe.arguments import Recipe

USUAL = "test"
OTHERS = ("validation", "valid", "val", "dev", "eval")
"""Names of held-out splits other than `test`."""


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


def hold_out(recipe: Recipe, sources: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Split off rows of every source, in proportion to its size; at most a fifth of each.

    Rows with the same prompt stay together, in all sources: no held-out prompt is trained on.
    """
    script, training = recipe.script, recipe.training
    total = sum(len(source) for source in sources.values())
    if not script.eval_rows or not total:
        return sources, {}
    room = Counter({n: min(round(script.eval_rows * len(s) / total), len(s) // 5) for n, s in sources.items()})
    places = _places_of_prompts(sources)
    prompts = sorted(places)
    random.Random(training.data_seed or training.seed).shuffle(prompts)
    apart: dict[str, list[int]] = {name: [] for name in sources}
    held = 0
    for prompt in prompts:
        taken = Counter(name for name, _ in places[prompt])
        if all(count <= room[name] for name, count in taken.items()):
            room -= taken
            held += 1
            for name, row in places[prompt]:
                apart[name].append(row)
    return _split(recipe, sources, apart, held, shared=total > len(prompts))


def _places_of_prompts(sources: dict[str, Dataset]) -> dict[str, list[tuple[str, int]]]:
    """The source and row of every prompt."""
    places: dict[str, list[tuple[str, int]]] = {}
    for name, source in sources.items():
        for row, prompt in enumerate(source["prompt"]):
            places.setdefault(json.dumps(prompt, sort_keys=True, default=str), []).append((name, row))
    return places


def _split(
    recipe: Recipe, sources: dict[str, Dataset], apart: dict[str, list[int]], prompts: int, shared: bool
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    total = sum(len(source) for source in sources.values())
    count = sum(map(len, apart.values()))
    of = f" with all rows of {prompts} prompts" if shared else ""
    if count:
        recipe.console.print(
            f"The data has no split {recipe.script.dataset_test_split!r}: {count} of its {total} rows are held "
            f"out{of} (--eval_rows 0 trains on all).",
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
        out = set(apart[name])
        rest[name] = source.select([row for row in range(len(source)) if row not in out]) if out else source
    return rest, {name: sources[name].select(sorted(rows)) for name, rows in apart.items() if rows}
