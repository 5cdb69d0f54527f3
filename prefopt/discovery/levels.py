"""The levels of the toy that candidates climb, each with more betas, seeds and steps than the one below."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from prefopt.discovery.archive import Result
from prefopt.discovery.grammar import Node
from prefopt.discovery.toy import Family, Worlds, make_worlds, train


@dataclass(frozen=True)
class ToyLevel:
    """Trainings on the toy.

    Attributes:
        name: in the archive.
        betas: of the loss.
        seeds: of the problems.
        steps: of training.
        family: of the gold reward.
    """

    name: str
    betas: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    family: Family = "linear"


SCREEN = ToyLevel("screen", (0.02, 0.1, 0.5), (0, 1), 60)
TOY = ToyLevel("toy", (0.01, 0.05, 0.1, 0.5, 1.0), (0, 1, 2, 3), 200)

HELD_OUT_BETAS = (0.01, 0.025, 0.1, 0.25, 1.0)
HELD_OUT = (
    ToyLevel("held-out, linear", HELD_OUT_BETAS, tuple(range(1000, 1005)), 200),
    ToyLevel("held-out, bent", HELD_OUT_BETAS, tuple(range(1000, 1005)), 200, "bent"),
)
"""Problems that no search sees: other gold rewards, prompts, pairs and betas, and for one another kind of reward."""


@functools.cache
def _worlds(seeds: tuple[int, ...], family: Family) -> Worlds:
    return make_worlds(seeds, family)


def run_level(level: ToyLevel, node: Node, candidate: int) -> list[Result]:
    """Train with an expression at every beta and seed of a level."""
    outcome = train(node, _worlds(level.seeds, level.family), level.betas, level.steps)
    results = []
    for b, beta in enumerate(level.betas):
        for s, seed in enumerate(level.seeds):
            tensors = (outcome.reward, outcome.kl, outcome.length, outcome.value)
            numbers = [float(values[b, s]) for values in tensors]
            whole = all(map(math.isfinite, numbers))
            results.append(Result(candidate, level.name, beta, seed, *(numbers if whole else [None] * 4)))
    return results
