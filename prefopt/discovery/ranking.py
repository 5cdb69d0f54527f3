"""How candidates compare: by Pareto layers of gold reward, KL and length at every beta, not by one number.

Each beta of a candidate is a point (reward, KL, change of length), a mean over seeds. Points of all candidates and
betas are sorted into Pareto layers. A candidate's rank is the layer of its worst point: DiscoPOP chose its winner at
one beta, and at a smaller one that winner collapses. Candidates of one layer are ordered by their value at the worst
beta, since a loss that ignores its beta, as softplus(-x / beta) does, is on the frontier, too, at one place of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.discovery.archive import Result


@dataclass(frozen=True)
class Point:
    """What a candidate scored at one beta, means over seeds.

    Attributes:
        beta: of the loss.
        reward: gold reward; higher is better.
        kl: from the reference, in nats; lower is better.
        length: distance between the answers' mean length and the reference's; lower is better.
        value: as in `toy.Outcome`; 0 where the level has none.
    """

    beta: float
    reward: float
    kl: float
    length: float
    value: float = 0.0


@dataclass(frozen=True)
class Score:
    """What a candidate scored at one level, by beta."""

    points: tuple[Point, ...]

    @property
    def value(self) -> float:
        """At the worst beta."""
        return min(point.value for point in self.points)

    @property
    def reward(self) -> float:
        """At the worst beta."""
        return min(point.reward for point in self.points)


def scores(results: Sequence[Result]) -> dict[int, Score]:
    """The score of every candidate of one level, but for those whose training became NaN or infinite."""
    by_candidate: dict[int, dict[float, list[Result]]] = {}
    for result in results:
        by_candidate.setdefault(result.candidate, {}).setdefault(result.beta, []).append(result)
    return {
        number: Score(tuple(_point(beta, runs) for beta, runs in by_beta.items()))
        for number, by_beta in by_candidate.items()
        if all(run.reward is not None for runs in by_beta.values() for run in runs)
    }


def _point(beta: float, runs: Sequence[Result]) -> Point:
    rows = [(run.reward or 0.0, run.kl or 0.0, run.length or 0.0, run.value or 0.0) for run in runs]
    reward, kl, length, value = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return Point(beta, reward, kl, abs(length), value)


def point_layers(scored: Mapping[int, Score]) -> dict[int, list[int]]:
    """For each candidate, the Pareto layer of each of its points among all points; 0 is the frontier."""
    owners = [number for number, score in scored.items() for _ in score.points]
    points = _tensor(scored)
    layer = torch.zeros(len(owners), dtype=torch.long)
    rest, depth = torch.arange(len(owners)), 0
    while len(rest):
        front = ~dominated(points[rest])
        layer[rest[front]] = depth
        rest, depth = rest[~front], depth + 1
    layers: dict[int, list[int]] = {number: [] for number in scored}
    for number, place in zip(owners, layer.tolist(), strict=True):
        layers[number].append(place)
    return layers


def dominated(points: Tensor) -> Tensor:
    """(P,) whether another of the (P, 3) points, of which more is better, is nowhere worse and somewhere better."""
    masks = []
    for part in torch.split(points, 256):
        no_worse = (points[None] >= part[:, None]).all(-1)
        masks.append((no_worse & (points[None] > part[:, None]).any(-1)).any(-1))
    return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)


def _tensor(scored: Mapping[int, Score]) -> Tensor:
    rows = [(point.reward, -point.kl, -point.length) for score in scored.values() for point in score.points]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def ranking(scored: Mapping[int, Score]) -> list[int]:
    """All candidates, best first: by the layer of the worst point, then by the value at the worst beta."""
    layers = point_layers(scored)
    return sorted(scored, key=lambda number: (max(layers[number]), -scored[number].value, number))


def frontier(scored: Mapping[int, Score]) -> list[tuple[int, Point]]:
    """The points that no other one dominates, with their candidates, by falling reward."""
    named = [(number, point) for number, score in scored.items() for point in score.points]
    front = (~dominated(_tensor(scored))).tolist()
    return sorted((pair for pair, on in zip(named, front, strict=True) if on), key=lambda pair: -pair[1].reward)
