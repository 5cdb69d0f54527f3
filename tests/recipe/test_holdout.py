"""Held-out rows are drawn by whole prompts, and the draw depends on the prompts' texts alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from prefopt.recipe.holdout import hold_out


def make_source(rng: random.Random, count: int, style: str) -> Dataset:
    def prompt() -> Any:
        words = rng.choice(["", "ü€", "x" * 60, "\0a", 'A"q']) + str(rng.randint(0, count // 2)) + rng.choice("é\n")
        system = {"role": "system", "content": "s" * 200}
        styles = {"messages": [system, {"role": "user", "content": words}], "with nulls": rng.choice([words, None])}
        return styles.get(style, words)

    return Dataset.from_list(
        [{"prompt": prompt(), "chosen": "a", "rejected": "b", "number": number} for number in range(count)]
    )


def drawn(sources: dict[str, Dataset], wanted: int, seed: int) -> dict[str, set[int]]:
    """The same draw, written with whole texts in memory."""
    total = sum(map(len, sources.values()))
    room = Counter({name: min(round(wanted * len(s) / total), len(s) // 5) for name, s in sources.items()})
    places: dict[str, list[tuple[str, int]]] = {}
    for name, source in sources.items():
        for row, prompt in enumerate(source["prompt"]):
            places.setdefault(json.dumps(prompt, sort_keys=True), []).append((name, row))
    prompts = sorted(places)
    random.Random(seed).shuffle(prompts)
    apart: dict[str, set[int]] = {name: set() for name in sources}
    for prompt in prompts:
        taken = Counter(name for name, _ in places[prompt])
        if all(count <= room[name] for name, count in taken.items()):
            room -= taken
            for name, row in places[prompt]:
                apart[name].add(row)
    return apart


@pytest.mark.parametrize("style", ["text", "messages", "with nulls"])
def test_the_draw_is_by_the_sorted_texts_of_prompts(style: str) -> None:
    rng = random.Random(style)
    for seed, (count, wanted) in enumerate([(7, 1), (50, 20), (900, 200), (900, 3)]):
        sources = {name: make_source(rng, count, style) for name in "abc"[: 1 + seed % 3]}
        options = SimpleNamespace(eval_rows=wanted, dataset_test_split="test")
        training = SimpleNamespace(data_seed=None, seed=seed)
        console = SimpleNamespace(print=lambda line, **_: None)
        recipe: Any = SimpleNamespace(script=options, training=training, console=console)
        rest, held = hold_out(recipe, sources)
        for name, apart in drawn(sources, wanted, seed).items():
            assert set(held[name]["number"] if name in held else []) == apart
            assert set(rest[name]["number"]) == set(range(count)) - apart
            assert list(rest[name]["number"]) == sorted(rest[name]["number"])
